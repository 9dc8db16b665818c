"""Decoding on a GPU: a turn's steps are captured once as a CUDA graph and then replayed (rollout.py does without).

A decode step is a hundred small kernels. Launched one by one from Python, they leave the GPU idle nine tenths of the
time; a graph launches them at once. Everything that a step changes has to stand in memory that stays where it is: the
ids, the column that is written, the cache, which keeps its full width (the mask hides the columns to come), and the
generator's state.
"""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from rollout import Decoder

# Not cuDNN's attention: for every length of the cache it makes a plan, which takes ten times the step itself.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class CapturedDecoder(Decoder):
    graph = None

    def feed_texts(self, texts, room):
        self.graph = None  # every turn has its own shapes
        return super().feed_texts(texts, room)

    def forward(self, ids):
        with sdpa_kernel(ATTENTION):
            return super().forward(ids)

    def step(self, tokens):
        if self.graph is None:
            used, self.ids, self.end = self.used, tokens[:, None].clone(), self.mask.shape[1]
            self.used = self.columns = torch.tensor([used], device=tokens.device)  # one tensor: replays move it on
            try:
                self.graph = self.capture(self.forward_and_on)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # a forward pass that looks at its numbers, as some mixtures of experts do
                # A capture that ends well: else the generators believe that the failed one goes on.
                self.capture(self.columns.zero_)
                self.used, self.step = used, super().step
                return self.step(tokens)
        self.graph.replay()
        return [x.clone() for x in self.drawn]

    def forward_and_on(self):
        self.drawn = self.forward(self.ids)
        self.ids.copy_(self.drawn[0][:, None])
        self.columns += 1

    def capture(self, function):
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None:
            graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph):
            function()
        return graph
