"""The model in PyTorch, its weights on disk, and answering with it. ../data/README.md describes the same in words.

Shapes: B sequences, T tokens (1 <bos>, 144 visual, then text), H query heads, G kv heads, D = 32 channels per head.
"""
import json
import math
import struct

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from scenes import PATCH, PATCHES, VISUAL_TOKENS
from vocabulary import BOS, EOS, VOCABULARY

WIDTH = 128
LAYERS = 4
HEADS = 8
KV_HEADS = 2
HEAD_WIDTH = 32
HIDDEN = 352
THETA = 10000.0
TEXT_STARTS = 1 + VISUAL_TOKENS
LONGEST = TEXT_STARTS + 160  # positions prepared for; the published model has seen about 125 text tokens


def rms_norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def rope_angles(positions):
    """cos and sin, [positions, D / 2]."""
    frequency = THETA ** (-torch.arange(0, HEAD_WIDTH, 2).float() / HEAD_WIDTH)
    angle = torch.arange(positions).float()[:, None] * frequency
    return torch.cos(angle), torch.sin(angle)


def rotate(x, cos, sin):
    """RoPE of x [..., T, D] on the pairs (i, i + D / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()

        def matrix(outputs, inputs, gain=1.0):
            return nn.Parameter(torch.randn(outputs, inputs) * gain / math.sqrt(inputs))

        self.n1 = nn.Parameter(torch.ones(WIDTH))
        self.n2 = nn.Parameter(torch.ones(WIDTH))
        self.wq = matrix(HEADS * HEAD_WIDTH, WIDTH)
        self.wk = matrix(KV_HEADS * HEAD_WIDTH, WIDTH)
        self.wv = matrix(KV_HEADS * HEAD_WIDTH, WIDTH)
        self.wo = matrix(WIDTH, HEADS * HEAD_WIDTH, gain=0.3)
        self.w1 = matrix(HIDDEN, WIDTH)
        self.w3 = matrix(HIDDEN, WIDTH)
        self.w2 = matrix(WIDTH, HIDDEN, gain=0.3)

    def heads(self, x, weight):
        """x [B, T, WIDTH] through a projection -> [B, heads, T, D], in the type of x."""
        return F.linear(x, weight.to(x.dtype)).unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)

    def attend(self, q, k, v, mask):
        """q [B, H, Tq, D], k and v [B, G, T, D], mask [Tq, T] to add -> [B, Tq, WIDTH]."""
        batch, heads, rows, width = q.shape
        q = q.reshape(batch, KV_HEADS, -1, width) * width**-0.5  # query head h reads kv head h // 4
        logits = (q @ k.transpose(2, 3)).unflatten(2, (-1, rows)) + mask
        out = logits.softmax(-1).flatten(2, 3) @ v
        out = out.reshape(batch, heads, rows, width).transpose(1, 2).flatten(2)
        return F.linear(out, self.wo.to(out.dtype))

    def feed_forward(self, x, dtype):
        h = rms_norm(x, self.n2).to(dtype)
        gate, up = F.linear(h, self.w1.to(dtype)), F.linear(h, self.w3.to(dtype))
        return x + F.linear(F.silu(gate) * up, self.w2.to(dtype)).float()


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        words = len(VOCABULARY)
        patch_values = PATCH * PATCH * 3
        self.emb = nn.Parameter(torch.randn(words, WIDTH) * 0.5)
        self.wp = nn.Parameter(torch.randn(WIDTH, patch_values) / math.sqrt(patch_values))
        self.bp = nn.Parameter(torch.zeros(WIDTH))
        self.pr = nn.Parameter(torch.randn(PATCHES, WIDTH) * 0.5)
        self.pc = nn.Parameter(torch.randn(PATCHES, WIDTH) * 0.5)
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
        self.nf = nn.Parameter(torch.ones(WIDTH))
        self.head = nn.Parameter(torch.randn(words, WIDTH) * 0.02)
        cos, sin = rope_angles(LONGEST)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def embed_image(self, patches):
        """<bos> and the image: patches [B, 144, 192] -> [B, 145, WIDTH]."""
        place = (self.pr[:, None] + self.pc[None]).reshape(1, VISUAL_TOKENS, WIDTH)
        visual = F.linear(patches, self.wp, self.bp) + place
        return torch.cat([self.emb[BOS].expand(len(patches), 1, -1), visual], 1)

    def logits(self, x, dtype=torch.float32):
        return F.linear(rms_norm(x, self.nf).to(dtype), self.head.to(dtype)).float()

    def forward(self, patches, tokens, dtype=torch.bfloat16):
        """Training pass. Returns the logits after every text token [B, text, words], and what the output head reads
        from the image tokens half-way up [B, 144, words] (for the auxiliary loss)."""
        x = torch.cat([self.embed_image(patches), self.emb[tokens]], 1)
        length = x.shape[1]
        cos, sin = self.cos[:length].to(dtype), self.sin[:length].to(dtype)
        mask = torch.full((length, length), -math.inf).triu(1).to(dtype)
        for i, layer in enumerate(self.layers):
            if i == LAYERS // 2:
                seen = self.logits(x[:, 1:TEXT_STARTS], dtype)
            h = rms_norm(x, layer.n1).to(dtype)
            k, v = rotate(layer.heads(h, layer.wk), cos, sin), layer.heads(h, layer.wv)
            first = TEXT_STARTS if i == LAYERS - 1 else 0  # nobody reads the image rows of the last layer
            q = rotate(layer.heads(h[:, first:], layer.wq), cos[first:], sin[first:])
            x = x[:, first:] + layer.attend(q, k, v, mask[first:]).float()
            x = layer.feed_forward(x, dtype)
        return self.logits(x, dtype), seen


class Dialogue:
    """One image and the turns about it, greedy, in float32 with the full cache."""

    def __init__(self, model, patches):
        self.model = model
        self.keys = [torch.zeros(1, KV_HEADS, 0, HEAD_WIDTH)] * LAYERS
        self.values = list(self.keys)
        self.length = 0
        with torch.no_grad():
            self._step(model.embed_image(torch.from_numpy(patches)[None]))

    def read(self, prompt):
        """Feeds a prompt; returns the logits for the first word of the answer."""
        with torch.no_grad():
            self.next = self._step(self.model.emb[prompt][None])
        return self.next

    def answer(self, cap):
        """At most `cap` tokens; every one is fed back, <eos> too."""
        out = []
        while len(out) < cap and (not out or out[-1] != EOS):
            out.append(int(self.next.argmax()))
            self.read(out[-1:])
        return out

    def _step(self, x):
        new, total = x.shape[1], self.length + x.shape[1]
        cos, sin = self.model.cos[self.length : total], self.model.sin[self.length : total]
        mask = torch.full((new, total), -math.inf).triu(1 + self.length)
        for i, layer in enumerate(self.model.layers):
            h = rms_norm(x, layer.n1)
            self.keys[i] = torch.cat([self.keys[i], rotate(layer.heads(h, layer.wk), cos, sin)], 2)
            self.values[i] = torch.cat([self.values[i], layer.heads(h, layer.wv)], 2)
            q = rotate(layer.heads(h, layer.wq), cos, sin)
            x = layer.feed_forward(x + layer.attend(q, self.keys[i], self.values[i], mask), torch.float32)
        self.length = total
        return self.model.logits(x[0, -1])


def save(path, model, **notes):
    """Writes safetensors: 8-byte header length, JSON padded with spaces to a multiple of 8, raw little-endian F32."""
    header = {"__metadata__": {name: str(value) for name, value in notes.items()}}
    blocks, offset = [], 0
    for name, tensor in model.state_dict().items():
        block = tensor.detach().float().contiguous().numpy().astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + len(block)]}
        blocks.append(block)
        offset += len(block)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text + b"".join(blocks))


def load(path):
    with open(path, "rb") as file:
        raw = file.read()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    state = {}
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        state[name] = torch.from_numpy(np.frombuffer(raw[begin:end], "<f4").reshape(entry["shape"]).copy())
    model = Decoder()
    model.load_state_dict(state)
    return model
