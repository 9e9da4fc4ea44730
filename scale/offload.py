"""`--offload_activations`: the inputs of the blocks wait for the backward pass in the host's memory.

Under gradient checkpointing the blocks keep nothing but their inputs. An input leaves the GPU while the next
block works, and comes back while that next block makes its backward pass, so at most two inputs are on the
GPU at one time. The copies have a stream of their own. The buffers on the host are pinned, and are used again
by the next forward pass. They are exactly as large as what they hold: PyTorch's own pinned memory would be
rounded up to powers of two, .67 GB to 1.07 GB.
"""
import weakref

import torch
from torch.cuda._pin_memory_utils import pin_memory, unpin_memory


class Away:
    """A tensor that waits on the host. before: the Away that left just before it in the same forward pass, or
    None."""

    def __init__(self, device, host, before):
        self.device, self.host, self.before = device, host, before
        self.back = self.arrived = None         # the tensor on its device again, and the event of its arrival


class Host:
    """Where the inputs of one model's blocks wait. `pack` and `unpack` are hooks for saved tensors."""

    def __init__(self):
        self.free = {}                  # (shape, dtype) -> buffers that hold nothing now
        self.bytes = 0                  # the size of all buffers
        self.shape = self.last = self.leaving = self.stream = None

    def begin(self, shape):
        """Starts a forward pass, whose tokens [b, n, d] have this shape."""
        self.shape, self.last = shape, None

    @torch.no_grad()
    def pack(self, x):
        if x.shape != self.shape:                   # not a block's input: a weight, or what all blocks share
            return x
        free = self.free.setdefault((x.shape, x.dtype), [])
        host = free.pop() if free else self.allocate(x)
        self.last = Away(x.device, host, self.last)
        if x.is_cuda:
            self.let_go(x.device)
            self.stream = self.stream or torch.cuda.Stream(x.device)
            self.stream.wait_stream(torch.cuda.current_stream(x.device))            # until x is computed
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
            self.fetch(kept.before)                 # it arrives while the block that asked for `kept` works
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
            self.stream.wait_stream(torch.cuda.current_stream(away.device))     # until that memory is free
            with torch.cuda.stream(self.stream):
                away.back.copy_(host, non_blocking=True)
                away.arrived = self.stream.record_event()
        else:
            away.back = host.to(away.device, copy=True)
        # the buffer is free at once, because the next copy into it waits in the same stream
        self.free[host.shape, host.dtype].append(host)

    def let_go(self, device):
        """Frees the tensor that left last. The device uses its memory again only after the copy of it is
        made."""
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
    """Makes the block inputs of a VideoDiT wait for the backward pass on the host -> their Host."""
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
