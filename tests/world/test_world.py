"""scene.py, annotator.py: the physics against a step-by-step simulation, and the annotator against clips
whose truth is known."""
import pytest
import torch

import common
from common import InputError
from formats.weights import SHIPPED
from model import load_transformer
from world import annotator, clips, scene

COMBINATIONS = {(c, s, d) for c in scene.COLORS for s in scene.SHAPES for d in scene.DIRECTIONS}


@pytest.fixture(scope="module")
def clean():
    videos, prompts, _ = scene.make(300, 1)
    return videos, prompts, annotator.annotate(videos, prompts)


def rate(values):
    return values.float().mean().item()


# ---- physics and rendering
def test_fold_is_a_particle_between_elastic_walls():
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        low, high = 0.1 + 0.1 * torch.rand((), generator=g), 0.7 + 0.2 * torch.rand((), generator=g)
        start = low + (high - low) * torch.rand((), generator=g)
        velocity = 0.6 * torch.rand((), generator=g) - 0.3
        position, speed, walked = start.item(), velocity.item(), []
        for _ in range(30):                                     # frame by frame, turning round at each wall
            walked.append(position)
            position += speed
            while not low <= position <= high:
                wall = high.item() if position > high else low.item()
                position, speed = 2 * wall - position, -speed
        path = scene.fold(start + velocity * torch.arange(30), low, high)
        torch.testing.assert_close(path, torch.tensor(walked), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", range(3))
def test_rendered_subjects_have_the_area_and_centre_they_should(shape):
    center, radius = torch.tensor([0.45, 0.55]), torch.tensor(0.17)
    alpha = scene.coverage(torch.eye(3)[shape], center, radius, 64)                # [h, w]
    assert alpha.mean().item() == pytest.approx(torch.pi * 0.17 ** 2, rel=0.03)
    grid = (torch.arange(64) + 0.5) / 64
    found = torch.stack([(alpha * grid).sum(), (alpha * grid[:, None]).sum()]) / alpha.sum()
    torch.testing.assert_close(found, center, atol=0.003, rtol=0)
    inside = (alpha > 0.5).nonzero() / 64  # its extents are where walls are
    low, high = scene.walls(torch.tensor(shape), radius)
    for axis, (first, last) in enumerate(zip(inside.min(0).values.flip(0), inside.max(0).values.flip(0))):
        assert low[axis] == pytest.approx((center[axis] - first).item(), abs=0.025)
        assert 1 - high[axis] == pytest.approx((last + 1 / 64 - center[axis]).item(), abs=0.025)


def test_a_clean_clip_moves_as_its_prompt_says(clean):
    """From the raw pixels alone: the brightest blob moves steadily, its way and in its colour."""
    videos, prompts, _ = clean
    for video, prompt in zip(videos[:60].float() / 255, prompts):
        asked = scene.parse_prompt(prompt)
        weight = (video - torch.tensor(scene.BACKGROUND)).abs().sum(-1)            # [f, h, w]
        grid = torch.arange(32) / 32
        center = torch.stack([(weight * grid).sum((1, 2)), (weight * grid[:, None]).sum((1, 2))], 1)
        center = center / weight.sum((1, 2))[:, None]                              # [f, 2]
        first = center[3] - center[0]
        way = torch.tensor(scene.DIRECTIONS[asked["direction"]])
        assert first @ way > 0.9 * first.norm() and 0.1 < first.norm() < 0.22
        peak = video[0].view(-1, 3)[weight[0].argmax()]
        nearest = min(scene.COLORS, key=lambda name: (peak - torch.tensor(scene.COLORS[name])).norm())
        assert nearest == asked["color"]


def test_make_is_determined_by_its_seed():
    a, b, c = (scene.make(8, seed, "mixture") for seed in (3, 3, 4))
    assert torch.equal(a[0], b[0]) and a[1:] == b[1:]
    assert not torch.equal(a[0], c[0]) and a[1] != c[1]


@pytest.mark.parametrize("size, shape", [("tiny", (9, 32, 32, 3)), ("mid", (9, 48, 48, 3)),
                                         ("small", (17, 64, 64, 3))])
def test_make_shapes(size, shape):
    videos, prompts, flaws = scene.make(3, 0, "flawed", size)
    assert videos.shape == (3, *shape) and videos.dtype == torch.uint8
    assert len(prompts) == 3 and all(len(f) == 1 and min(f.values()) >= 0.6 for f in flaws)
    c, f, h, w = scene.LATENT_SHAPES[size]
    assert (4 * (f - 1) + 1, 8 * h, 8 * w) == shape[:3]


def test_unusable_arguments():
    with pytest.raises(InputError, match="kind must be .*'bogus'"):
        scene.make(1, 0, "bogus")
    with pytest.raises(InputError, match="size must be .*'huge'"):
        scene.make(1, 0, size="huge")
    for video in (torch.zeros(1, 9, 32, 32, 3), torch.zeros(9, 32, 32, 3, dtype=torch.uint8)):
        with pytest.raises(InputError, match="uint8"):
            annotator.annotate(video, ["a"])


# ---- prompts
def test_prompts_of_training_validation_and_test_are_disjoint():
    prompts = {split: scene.all_prompts(split) for split in ("train", "validation", "test")}
    flat = {split: {s for sentences in of.values() for s in sentences} for split, of in prompts.items()}
    everything = set().union(*flat.values())
    assert sum(map(len, flat.values())) == len(everything) == len(COMBINATIONS) * len(scene.WORDINGS) * 2
    assert len(flat["test"]) > 64 and len(flat["validation"]) > 32
    # Training lacks sentences, but no combination of colour, shape and direction.
    assert set(prompts["train"]) == COMBINATIONS and all(prompts["train"].values())
    assert set(scene.make(64, 5, "mixture")[1]) <= flat["train"]
    assert set(scene.make(64, 5, split="test")[1]) <= flat["test"]
    assert set(scene.draw_prompts(64, 5, split="validation")) <= flat["validation"]


def test_reworded_sentences_share_no_wording_with_the_world():
    """Every combination, no sentence, verb or phrase of the world's; what is left in common are the words
    asked for, and articles."""
    reworded = scene.all_prompts("reworded")
    everything = set()
    for split in ("train", "validation", "test"):
        everything.update(*scene.all_prompts(split).values())
    assert set(reworded) == COMBINATIONS
    sentences = {s for of in reworded.values() for s in of}
    assert len(sentences) == len(COMBINATIONS) * len(scene.REWORDED) * 2 and not sentences & everything
    words = lambda sentences: {word.strip(",:") for s in sentences for word in s.split()}
    asked = {*scene.COLORS, *scene.SHAPES, *scene.DIRECTIONS}
    assert words(sentences) & words(everything) <= asked | {"a", "the", "that"}
    assert set(scene.make(64, 5, split="reworded")[1]) <= sentences


def test_prompts_are_read_back():
    for split in ("train", "validation", "test", "reworded"):
        for (c, s, d), sentences in scene.all_prompts(split).items():
            for sentence in sentences:
                assert scene.parse_prompt(sentence) == {"color": c, "shape": s, "direction": d}
    assert scene.parse_prompt("Two BLUE squares.") == {"color": "blue", "shape": "square", "direction": None}
    assert scene.parse_prompt("") == {"color": None, "shape": None, "direction": None}


# ---- the annotator
def test_clean_clips_qualify(clean):
    annotations = clean[2]
    assert rate(annotations["qualified"]) >= 0.99 and rate(annotations["unqualified"]) <= 0.003
    assert rate(annotations["dynamic"]) == 1 and rate(annotations["adherent"]) >= 0.99
    held_out = scene.make(100, 2, split="test")
    assert rate(annotator.annotate(*held_out[:2])["qualified"]) >= 0.99


@pytest.mark.parametrize("severity", [0.8, 1.0])
@pytest.mark.parametrize("flaw", scene.PHYSICAL + scene.DEFORMITY)
def test_flawed_clips_fail(flaw, severity):
    videos, prompts, _ = scene.make(100, 7, flaw, severity=severity)
    assert rate(annotator.annotate(videos, prompts)["qualified"]) <= 0.03


@pytest.mark.parametrize("factor", [0.3, 0.6, 0.8, 1.35, 1.6])
def test_motion_outside_the_worlds_speeds_fails(factor, monkeypatch):
    slowest, fastest = scene.SPEED
    speed = factor * (slowest if factor < 1 else fastest)
    with monkeypatch.context() as patch:
        patch.setattr(scene, "SPEED", (speed, speed))
        videos, prompts, _ = scene.make(60, 8)
    assert rate(annotator.annotate(videos, prompts)["qualified"]) <= 0.03


@pytest.mark.parametrize("field, names", [("color", scene.COLORS), ("shape", scene.SHAPES),
                                          ("direction", scene.DIRECTIONS)])
def test_contradicting_prompts_fail(clean, field, names):
    videos, prompts, _ = clean
    for shift in range(1, len(names)):  # every other value it could be
        asked = [scene.parse_prompt(prompt) for prompt in prompts]
        for a in asked:
            a[field] = list(names)[(list(names).index(a[field]) + shift) % len(names)]
        annotations = annotator.annotate(videos, [f"a {a['color']} {a['shape']} moving "
                                             f"{a['direction']}" for a in asked])
        assert rate(annotations["adherent"]) <= 0.005 and rate(annotations["qualified"]) <= 0.005
        assert rate(annotations["unqualified"]) >= 0.995


def test_what_the_prompt_leaves_open_is_free(clean):
    videos, _, annotations = clean
    vague = annotator.annotate(videos, ["something moves"] * len(videos))
    assert vague["adherent"].all() and rate(vague["qualified"]) >= rate(annotations["qualified"])


def test_degenerate_videos_never_qualify(clean):
    videos, prompts = clean[0][:100], clean[1][:100]
    g = torch.Generator().manual_seed(0)
    noise = torch.randint(256, videos.shape, generator=g, dtype=torch.uint8)
    background = (255 * torch.tensor(scene.BACKGROUND)).round().to(torch.uint8).expand_as(videos)
    brighter = (videos.float() * 1.6 + 40).clamp(0, 255).to(torch.uint8)
    degenerate = {"static": videos[:, :1].expand_as(videos), "noise": noise,
                  "black": torch.zeros_like(videos),
                  "white": torch.full_like(videos, 255), "empty": background, "brighter": brighter,
                  "faint": ((videos.float() + 4 * background.float()) / 5).to(torch.uint8),
                  "shuffled": videos[:, [4, 0, 6, 2, 8, 1, 5, 3, 7]],
                  "grey": videos.float().mean(-1, keepdim=True).to(torch.uint8).expand_as(videos)}
    wrong = {name: rate(annotator.annotate(v, prompts)["qualified"]) for name, v in degenerate.items()}
    assert wrong == dict.fromkeys(degenerate, 0.0)


def test_strict_and_loose_annotators_differ_in_their_limits_alone():
    """A loose one takes what a strict one takes, and more; each error is held to its own limits."""
    videos, prompts, _ = scene.make(200, 3, "mixture")
    found = annotator.annotate(videos, prompts)
    strict, firm, loose = (annotator.grade(found, tolerance) for tolerance in annotator.ANNOTATORS.values())
    assert all(torch.equal(found[name], firm[name]) for name in firm)
    for a, b in ((strict, firm), (firm, loose)):
        assert (a["physical"] <= b["physical"]).all() and (a["deformity"] <= b["deformity"]).all()
        assert a["qualified"].sum() < b["qualified"].sum() and not (a["qualified"] & ~b["qualified"]).any()
    none = {name: torch.zeros(4) for name in annotator.LIMITS}
    none |= {"absent": torch.tensor([False, False, False, True]), "adherent": torch.ones(4, dtype=torch.bool)}
    error = none | {"area_error": torch.tensor([0.19, 0.21, 0.31, 0.0])}        # LIMITS: .20 and .30
    assert annotator.grade(error)["deformity"].tolist() == [2, 1, 0, 0]
    assert annotator.grade(error)["physical"].tolist() == [2, 2, 2, 0]
    assert annotator.grade(error, 1.25)["deformity"].tolist() == [2, 2, 1, 0]
    assert annotator.grade(error, 0.8)["deformity"].tolist() == [1, 1, 0, 0]
    assert annotator.grade(error)["qualified"].tolist() == [True, False, False, False]


def test_the_panel_sees_what_hacking_changes(clean):
    videos, prompts, annotations = clean
    frozen = annotator.annotate(videos[:50, :1].expand(-1, 9, -1, -1, -1), prompts[:50])
    assert frozen["speed"].max() < 1e-6 and not frozen["dynamic"].any()
    double = annotator.annotate((videos[:50].float() * 1.3).clamp(0, 255).to(torch.uint8), prompts[:50])
    assert (double["brightness"] > 1.1 * annotations["brightness"][:50]).all()
    grey = videos[:50].float().mean(-1, keepdim=True).to(torch.uint8).expand(-1, -1, -1, -1, 3)
    grey = annotator.annotate(grey, prompts[:50])
    assert grey["saturation"].max() < 1e-6 < annotations["saturation"].min()


def test_a_clip_is_graded_alone(clean):
    videos, prompts, annotations = clean  # 300: two parts of at most 256
    videos = torch.cat([videos[:40], scene.make(40, 9, "flawed")[0]])
    prompts = prompts[:40] + scene.make(40, 9, "flawed")[1]
    together = annotator.annotate(videos, prompts)
    place = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    mixed = annotator.annotate(videos[place], [prompts[i] for i in place])
    few = annotator.annotate(videos[37:43], prompts[37:43])
    for key, values in together.items():
        torch.testing.assert_close(mixed[key], values[place], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(few[key], values[37:43], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(values[:40], annotations[key][:40], atol=1e-5, rtol=1e-4)


# ---- a generator's own samples
def test_samples_are_kept_and_known_by_their_settings(tmp_path):
    model = str(SHIPPED["t2v"])
    generator, runtime = load_transformer(model).eval(), common.setup("no")
    made = clips.own_samples(tmp_path, generator, model, 4, 2, "tiny", 0, runtime)
    again = clips.own_samples(tmp_path, generator, model, 4, 2, "tiny", 0, runtime)
    assert torch.equal(made.labels, again.labels)
    refused = "was made with .* give another folder with --samples_dir"
    for count, shift in ((5, 1.0), (4, 3.0)):                   # another number, another sampler
        with pytest.raises(InputError, match=refused):
            clips.own_samples(tmp_path, generator, model, count, 2, "tiny", 0, runtime, shift=shift)
    with pytest.raises(InputError, match=refused):              # another generator
        clips.own_samples(tmp_path, generator, model, 4, 2, "tiny", 0, runtime,
                          transformer=SHIPPED["i2v"] / "transformer")


def test_labels_of_clips():
    annotations = {"qualified": torch.tensor([True, False, False]),
                   "unqualified": torch.tensor([False, True, False])}
    assert clips.labels_of(annotations) == [1, 0, None]
