"""Trains the model from nothing, on scenes and prompts made as it goes.

    python3 train.py --out my.safetensors

First easy scenes with bare questions, until the model reads the image at all; then scenes of 3 to 6 objects, with the
text around the question growing to its full length. Hidden matrices are trained with Muon (momentum whose update is
made orthogonal by a Newton-Schulz iteration), everything else with AdamW.
"""
import argparse
import math
import time

import numpy as np
import torch
import torch.nn.functional as F

import model as network
import questions
import scenes
from vocabulary import ID

EASY_SHARES = [0.10, 0.46, 0.44]  # of desc, where, shape
FULL_SHARES = [0.45, 0.27, 0.28]
EASY_ENOUGH = 0.85  # share of answer tokens that are right when the easy stage ends


def make_batch(rng, size, text_tokens, easy, chatter_scale):
    """Dialogues about `size` scenes, as many turns as fit into text_tokens + 1.

    Returns patches [size, 144, 192], tokens [size, text_tokens + 1], a mask that is 1 on answers, and the four words
    (colour, shape, row, column) that describe each patch [size, 144, 4], 0 where no object is.
    """
    fewest, most, shares = (1, 4, EASY_SHARES) if easy else (3, 6, FULL_SHARES)
    sampled, images = scenes.sample_scenes(rng, size, fewest, most)
    tokens = np.zeros((size, text_tokens + 1), np.int64)
    is_answer = np.zeros((size, text_tokens + 1), np.float32)
    described = np.zeros((size, scenes.PATCHES, scenes.PATCHES, 4), np.int64)
    for b, scene in enumerate(sampled):
        used = 0
        while True:
            kind = questions.KINDS[rng.choice(len(shares), p=shares)]
            colour = questions.pick_colour(rng, scene)
            if used == 0:
                prompt = questions.first_turn(rng, kind, colour, chatter_scale)
            else:
                prompt = questions.question(rng, kind, colour)
            answer = questions.answer(kind, scene, colour)
            if used + len(prompt) + len(answer) > text_tokens + 1:
                break
            middle, end = used + len(prompt), used + len(prompt) + len(answer)
            tokens[b, used:middle], tokens[b, middle:end] = prompt, answer
            is_answer[b, middle:end] = 1
            used = end
        for thing in scene:
            top, left = 2 * thing.row, 2 * thing.column
            described[b, top : top + 2, left : left + 2] = [ID[word] for word in questions.words_of(thing)]
    return scenes.to_patches(images), tokens, is_answer, described.reshape(size, scenes.VISUAL_TOKENS, 4)


def orthogonalised(gradient):
    """Five steps of Newton-Schulz towards the nearest matrix whose singular values are all equal."""
    x = gradient.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.t() if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.t()
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.t() if tall else x).float()


class Muon:
    def __init__(self, parameters, rate, momentum=0.95, decay=0.01):
        self.parameters, self.rate, self.momentum, self.decay = parameters, rate, momentum, decay
        self.running = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, scale):
        for p, running in zip(self.parameters, self.running):
            running.mul_(self.momentum).add_(p.grad)
            update = orthogonalised(p.grad + self.momentum * running)
            rate = self.rate * scale
            p.mul_(1 - rate * self.decay).add_(update, alpha=-rate * math.sqrt(max(1, p.shape[0] / p.shape[1])))


def schedule(done):
    """The learning rate's factor when the share `done` of the steps is over: short warm-up, flat, linear to 2 %."""
    return min(1.0, done / 0.02) * (1.0 if done < 0.5 else max(0.02, (1 - done) / 0.5))


def losses(model, batch):
    """Returns the loss on answers, the auxiliary loss, and the share of answer tokens that are right.

    The auxiliary loss asks the image tokens, half-way up, for the words that describe their object, which helps the
    model to start reading the image.
    """
    patches, tokens, is_answer, described = (torch.from_numpy(part) for part in batch)
    logits, seen = model(patches, tokens[:, :-1])
    wanted, weight = tokens[:, 1:], is_answer[:, 1:]
    entropy = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(weight)
    right = (((logits.argmax(-1) == wanted) * weight).sum() / weight.sum()).item()
    on_object = described[..., 0] > 0
    auxiliary = -F.log_softmax(seen[on_object], -1).gather(1, described[on_object]).mean(0).sum()
    return (entropy * weight).sum() / weight.sum(), auxiliary, right


def train(options):
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    model = network.load(options.init) if options.init else network.Decoder()
    hidden = [p for name, p in model.named_parameters() if name.startswith("layers") and p.ndim == 2]
    others = [p for name, p in model.named_parameters() if not (name.startswith("layers") and p.ndim == 2)]
    muon = Muon(hidden, options.rate)
    adam = torch.optim.AdamW(others, lr=options.adam_rate, betas=(0.9, 0.98), weight_decay=0.0)

    easy = not options.init
    loss_seen, right_seen = None, 0.0  # running means
    started = time.time()
    for step in range(1, options.steps + 1):
        done = step / options.steps
        chatter_scale = 0.0 if easy else min(1.0, done / options.full_chatter_at)
        loss, auxiliary, right = losses(model, make_batch(rng, options.batch, options.text, easy, chatter_scale))
        model.zero_grad(set_to_none=True)
        (loss + options.auxiliary * auxiliary).backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for group in adam.param_groups:
            group["lr"] = options.adam_rate * schedule(done)
        adam.step()
        muon.step(schedule(done))

        loss_seen = loss.item() if loss_seen is None else 0.97 * loss_seen + 0.03 * loss.item()
        right_seen = 0.97 * right_seen + 0.03 * right
        if easy and (right_seen > EASY_ENOUGH or step >= options.easy_at_most):
            easy = False
            print(f"step {step}: the easy stage is over", flush=True)
        if step % 50 == 0 or step == options.steps:
            print(
                f"step {step} of {options.steps}, {time.time() - started:.0f} s: loss {loss_seen:.3f}, "
                f"right {right_seen:.4f}, chatter {chatter_scale:.2f}, auxiliary {auxiliary.item():.2f}",
                flush=True,
            )
            network.save(options.out, model, step=step, seed=options.seed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", default="retrained.safetensors", help="where the weights go, every 50 steps (default: %(default)s)")
    add("--init", default="", help="go on from these weights, without the easy stage")
    add("--steps", type=int, default=1600)
    add("--batch", type=int, default=32, help="scenes per step (default: %(default)s)")
    add("--text", type=int, default=96, help="text tokens per scene, over all turns (default: %(default)s)")
    add("--easy-at-most", type=int, default=700, help="steps of the easy stage at most (default: %(default)s)")
    add("--full-chatter-at", type=float, default=0.5, help="share of the steps after which prompts have full length")
    add("--rate", type=float, default=0.02, help="learning rate of the hidden matrices (default: %(default)s)")
    add("--adam-rate", type=float, default=3e-3, help="learning rate of the rest (default: %(default)s)")
    add("--auxiliary", type=float, default=0.1, help="weight of the auxiliary loss (default: %(default)s)")
    add("--seed", type=int, default=1)
    add("--threads", type=int, default=1)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
