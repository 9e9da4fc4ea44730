"""Block inputs that wait for the backward pass in the host's memory: `--offload_activations`.

Under gradient checkpointing they are all that the blocks keep. Each leaves a GPU while the next block works,
and comes back while the block behind it makes its backward pass, so at most two of them are on the GPU at one
time. The copies have a stream of their own. The buffers on the host are pinned, are used again by the next
forward pass, and are exactly as large as what they hold: PyTorch's own pinned memory is rounded up to powers
of two, which would make .67 GB 1.07.
"""
import weakref

import torch
from torch.cuda._pin_memory_utils import pin_memory, unpin_memory


class Away:
    """A tensor that waits on the host. before: what left before it in the same forward pass, or None."""

    def __init__(self, device, host, before):
        self.device, self.host, self.before = device, host, before
        self.back = self.arrived = None                         # on its device again, and when


class Host:
    """Where the inputs of one model's blocks wait. `pack` and `unpack` are hooks for saved tensors."""

    def __init__(self):
        self.free = {}                  # (shape, dtype) -> buffers that hold nothing now
        self.bytes = 0                  # of all buffers
        self.shape = self.last = self.leaving = self.stream = None

    def begin(self, shape):
        """A forward pass starts, whose tokens [b, n, d] have this shape."""
        self.shape, self.last = shape, None

    @torch.no_grad()
    def pack(self, x):
        if x.shape != self.shape:                               # a weight, or what all blocks share
            return x
        free = self.free.setdefault((x.shape, x.dtype), [])
        host = free.pop() if free else self.allocate(x)
        self.last = Away(x.device, host, self.last)
        if x.is_cuda:
            self.let_go(x.device)
            self.stream = self.stream or torch.cuda.Stream(x.device)
            self.stream.wait_stream(torch.cuda.current_stream(x.device))                    # x is made
            with torch.cuda.stream(self.stream):
                host.copy_(x, non_blocking=True)
                self.leaving = x, self.stream.record_event()
        else:
            host.copy_(x)
        return self.last

    @torch.no_grad()
    def unpack(self, kept):
        if not isinstance(kept, Away):
            return kept
        self.fetch(kept)
        if kept.before is not None:
            self.fetch(kept.before)                             # while the block that asks for `kept` works
        if kept.arrived is not None:
            torch.cuda.current_stream(kept.device).wait_event(kept.arrived)
        x, kept.back = kept.back, None
        return x

    def fetch(self, away):
        """Starts a copy back, if it was not started yet."""
        host, away.host = away.host, None
        if host is None:
            return
        if away.device.type == "cuda":
            self.let_go(away.device)
            away.back = torch.empty_like(host, device=away.device)
            self.stream.wait_stream(torch.cuda.current_stream(away.device))     # that memory is free by then
            with torch.cuda.stream(self.stream):
                away.back.copy_(host, non_blocking=True)
                away.arrived = self.stream.record_event()
        else:
            away.back = host.to(away.device, copy=True)
        # the next copy into it waits in the same stream
        self.free[host.shape, host.dtype].append(host)

    def let_go(self, device):
        """The tensor that left last was kept until now: its memory is used again when its copy is made."""
        if self.leaving is not None:
            torch.cuda.current_stream(device).wait_event(self.leaving[1])
            self.leaving = None

    def allocate(self, x):
        host = torch.empty(x.shape, dtype=x.dtype)
        self.bytes += host.nbytes
        if x.is_cuda:
            pin_memory(host.data_ptr(), host.nbytes)
            weakref.finalize(host, unpin_memory, host.data_ptr()).atexit = False
        return host


def offload(dit):
    """The block inputs of a VideoDiT that wait for the backward pass do so on the host -> their Host."""
    patchify, run_blocks, host = dit.patchify, dit.run_blocks, Host()

    def first_tokens(*args):
        tokens = patchify(*args)
        host.begin(tokens.shape)
        return tokens

    def run_offloaded(*args):
        with torch.autograd.graph.saved_tensors_hooks(host.pack, host.unpack):
            return run_blocks(*args)

    dit.patchify, dit.run_blocks = first_tokens, run_offloaded
    return host
