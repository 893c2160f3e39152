"""A training run and the same run computed by hand: the harness of all tests in this folder.

The last tests of a method train for two or three steps on a handful of rows, and compute the same
steps in the plainest way: one sequence at a time, without padding, from all logits, with Adam as in
its paper. The figures that the script logged and its final weights must equal these numbers:

    run = by_hand.Run(dpo, tmp_path, ROWS, HELD_OUT, watch=["pair_losses"], beta=0.7)
    hand = by_hand.Training(run)                      # the weights before the first step
    for batch in run.batches("pair_losses"):          # the pairs of each optimizer step
        loss, figures = figures_by_hand(hand.model, hand.reference, batch)
        hand.log(figures | hand.update(loss))         # gradient, clipping, learning rate, Adam
    hand.check(run)                                   # each logged figure, each trained weight
    by_hand.close(run.summary["after"], figures_of_held_out, "held out")

The script computes in float64, too, so that both results agree to a millionth and no mistake can
hide behind rounding. (tests/system/test_loop.py tests the other dtypes.) The computation by hand
must not use any function of a script.
"""
import contextlib
import copy
import functools
import json
import math
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
import torch
import torch.nn.functional as F
from conftest import metrics_of, run_args
from safetensors.torch import load_file
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, Qwen2RotaryEmbedding

import common

# ---- rows, tokens and answers --------------------------------------------------------------------

def ask(text):
    return [{"role": "user", "content": text}]


def say(text):
    return [{"role": "assistant", "content": text}]


@functools.cache
def tokenizer():
    """The tiny model's tokenizer, with ChatML: <|im_start|>role\\n ... <|im_end|>\\n."""
    return common.load_tokenizer("tiny/chat")


def prompt_ids(messages):
    """The ids of a prompt in the chat template, up to and with the header of the answer."""
    return tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def answer_ids(text):
    """The ids of an answer, with the token that ends it."""
    return tokenizer()(text + "<|im_end|>").input_ids


def answer_to(prompt, number=0):
    """A made-up answer, a function of its prompt and its number. 2, 5, 8, ... do not stop."""
    draw = random.Random(f"{prompt} {number}")
    text = f"{draw.randrange(100)} + {draw.randrange(10)} = {draw.randrange(1000)}"
    ids = tokenizer()(text[draw.randrange(6):]).input_ids
    return ids + [tokenizer().eos_token_id] * (number % 3 < 2)


def fixed_sample(model, _, prompts, copies, *rest):
    """A stand-in for `sample`, used as `replace={"sample": by_hand.fixed_sample}`."""
    return [answer_to(prompt, number) for prompt in prompts for number in range(copies)]


# ---- models --------------------------------------------------------------------------------------

def logps(model, prompt, answer, temperature=1.0):
    """[N]: log π of each token of an answer, from all logits of one unpadded sequence."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1]
    return (logits / temperature).log_softmax(-1)[range(len(answer)), answer]


def hidden_states(model, ids):
    """[T, D]: the input to the head of a reward model or critic."""
    return common.causal_lm(model).base_model(input_ids=torch.tensor([ids]))[0][0]


def move(model, seed=0, std=0.02):
    """Moves the policy away from its reference. (A new LoRA adapter changes nothing.)"""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B.default" in name:
            weight.data += std * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)


def save_adapter(folder, **moved):
    """Saves an adapter on tiny/chat that has a clear effect, for use as the --model of a run."""
    model = common.load_model("tiny/chat", lora_rank=4)
    move(model, **moved)
    common.save_model(model, tokenizer(), folder)
    return str(folder)


def two_stops(folder):
    """Saves tiny/chat with a second stop token, " =", in its generation_config.json."""
    place = shutil.copytree("tiny/chat", Path(folder, "two_stops"))
    stops = [tokenizer().eos_token_id, *tokenizer()(" =").input_ids]
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return str(place)


# ---- the run -------------------------------------------------------------------------------------

def exact_norm(self, x):
    """RMSNorm in float64. (The one in transformers computes in fp32, whatever the dtype of x.)"""
    normed = F.rms_norm(x.double(), self.weight.shape, eps=self.variance_epsilon)
    return (self.weight * normed).to(x.dtype)


def exact_rotary(self, x, position_ids):
    """Rotary embeddings in float64, for the same reason."""
    angles = position_ids[..., None].double() * self.inv_freq.double()  # [B, L, D/2]
    angles = torch.cat([angles, angles], dim=-1)
    return tuple(part.to(x.dtype) for part in (angles.cos(), angles.sin()))


Qwen2RMSNorm.forward, Qwen2RotaryEmbedding.forward = exact_norm, exact_rotary


@contextlib.contextmanager
def doubles():
    """Makes the scripts compute in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(common, "choose_dtype", lambda device: torch.float64)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


class Run:
    """A call of a script's `train`, with a record of what it did.

    `metrics` (a dict per step), `summary` and `saved` (weights by name) are the files it left in
    `folder`. `updates` holds, per optimizer step, the `gradients` before clipping, the `weights`
    after the step, and `is_training`, the mode of the model. `calls[name]` holds the calls of each
    function named in `watch`: `args`, `result`, `is_training` (whether gradients were on) and
    `update` (the number of optimizer steps before the call). `replace` replaces functions of the
    script or, under names such as "common.autocast", of common.
    """

    def __init__(self, script, folder, rows=None, held_out=None, watch=(), replace=None,
                 double=True, processes=1, **flags):
        self.folder, self.updates, self.calls = Path(folder, "run"), [], {x: [] for x in watch}
        given = {"output_dir": self.folder, "batch_size": 4, "learning_rate": 2e-3}
        for flag, data in ("dataset", rows), ("eval_dataset", held_out):
            if data:
                given[flag] = Path(folder, flag + ".jsonl")
                given[flag].parent.mkdir(exist_ok=True)
                given[flag].write_text("".join(json.dumps(row) + "\n" for row in data))
        self.args = run_args(script, **given | flags)
        numbers = doubles() if double else contextlib.nullcontext()
        with pytest.MonkeyPatch.context() as patch, numbers:
            self.watch(patch, script, replace or {})
            script.train(self.args) if processes == 1 else self.fork(script, processes)
        self.metrics = metrics_of(self.folder)
        self.summary = json.loads((self.folder / "summary.json").read_text())
        self.saved = load_file(next(self.folder.glob("*model.safetensors")))

    def watch(self, patch, script, replace):
        # A process may train twice in the same folder. (The lock ends with the process.)
        patch.setattr(filelock.FileLock, "acquire", lambda *args, **kwargs: None)
        for name, function in replace.items():
            owner = common if name.startswith("common.") else script
            patch.setattr(owner, name.removeprefix("common."), function)
        for name in self.calls:
            patch.setattr(script, name, functools.partial(self.call, name, getattr(script, name)))
        load_model, update = common.load_model, script.update

        def load_and_keep(*args, **kwargs):
            self.model = load_model(*args, **kwargs)
            return self.model

        def update_and_keep(optimizer, *rest):
            weights = optimizer.param_groups[0]["params"]
            if not self.updates:  # one deepcopy, so that the copied weights belong to the copy
                self.start = copy.deepcopy((self.model, weights))
            gradients = [None if w.grad is None else w.grad.clone() for w in weights]
            logged = update(optimizer, *rest)
            after = [w.detach().clone() for w in weights]
            self.updates.append(SimpleNamespace(
                gradients=gradients, weights=after, is_training=self.model.training))
            return logged

        patch.setattr(common, "load_model", load_and_keep)
        patch.setattr(script, "update", update_and_keep)

    def call(self, name, function, *args, **kwargs):
        training = torch.is_grad_enabled()
        call = SimpleNamespace(args=args, update=len(self.updates), is_training=training)
        call.result = function(*args, **kwargs)
        self.calls[name].append(call)
        return call.result

    def batches(self, name, position=1):
        """The examples of each optimizer step, read from an argument of a watched function."""
        batches = [[] for _ in self.updates]
        for call in self.calls[name]:
            if call.is_training:
                batches[call.update] += call.args[position]
        return batches

    def fork(self, script, count):
        """Trains in several processes. Of their records, only `updates` of rank 0 comes back."""
        def work(rank):
            common.RANK, common.WORLD = rank, count
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{self.folder}.store", rank=rank, world_size=count)
            torch.manual_seed(rank)  # processes start in different random states
            script.train(self.args)
            if rank == 0:
                torch.save([vars(x) for x in self.updates], f"{self.folder}.updates")
            os._exit(0)  # skips pytest's shutdown

        torch.multiprocessing.start_processes(work, nprocs=count, start_method="fork")
        self.updates = [SimpleNamespace(**x) for x in torch.load(f"{self.folder}.updates")]


# ---- the same by hand ----------------------------------------------------------------------------

class Training:
    """The weights before the first step of a run, and optimizer steps from there.

    `model` is the policy, `reference` is a frozen copy of it, and `weights[-1]` is the head, if the
    script trains a critic.
    """

    def __init__(self, run):
        self.model, self.weights = copy.deepcopy(run.start)
        self.reference = copy.deepcopy(self.model).requires_grad_(False)
        self.start = [w.detach().clone() for w in self.weights]
        self.first, self.second = ([torch.zeros_like(w) for w in self.weights] for _ in range(2))
        self.peak, self.steps = run.args.learning_rate, len(run.metrics)
        self.logged, self.count = [], 0

    def update(self, loss):
        """One step of Adam (Kingma and Ba 2015, algorithm 1), the gradient clipped to norm 1."""
        gradients = torch.autograd.grad(loss, self.weights)
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        assert self.steps < 6  # fewer than 6 steps have no warm-up, only the cosine decay
        rate = self.peak * math.cos(math.pi * len(self.logged) / (2 * self.steps)) ** 2
        self.count += 1
        for weight, g, m, v in zip(self.weights, gradients, self.first, self.second, strict=True):
            g = g / max(1.0, norm)
            m.copy_(0.9 * m + 0.1 * g)
            v.copy_(0.999 * v + 0.001 * g * g)
            mean, square = m / (1 - 0.9**self.count), v / (1 - 0.999**self.count)
            weight.data -= rate * mean / (square.sqrt() + 1e-8)
        return {"loss": loss.item(), "grad_norm": norm, "learning_rate": rate}

    def log(self, figures):
        """Records the figures of a logged step, which may have had several updates."""
        self.logged.append(figures)

    def check(self, run, rel=1e-6):
        """Asserts that figures and weights of the run equal those computed by hand."""
        for line, figures in zip(run.metrics, self.logged, strict=True):
            close(line, figures, f"step {line['step']}", rel)
        ends = zip(self.weights, self.start, run.updates[-1].weights, strict=True)
        for number, (weight, start, ours) in enumerate(ends):
            moved, away = (weight - start).norm().item(), (ours - weight).norm().item()
            assert away <= 10 * rel * moved + 1e-9, (
                f"trained weight {number} of {len(self.weights)} moved by {moved:.3g} by hand, and "
                f"ends {away:.3g} away in the run: does the gradient belong to the logged loss?")


def close(ours, expected, where, rel=1e-6, absolute=1e-9):
    """Asserts that two numbers agree, or two dicts, in the names that `expected` has."""
    if isinstance(expected, dict):
        for name, value in expected.items():
            assert name in ours, f"{where}: there is no {name} in {sorted(ours)}"
            close(ours[name], value, f"{where}, {name}", rel, absolute)
        return
    expected = float(expected)
    if ours is None or not math.isclose(ours, expected, rel_tol=rel, abs_tol=absolute):
        pytest.fail(f"{where}: expected {expected:.7g}, got {ours}{guess(ours, expected)}")


def guess(ours, expected):
    """A likely mistake that would turn one number into the other."""
    ratio = ours / expected if ours and expected else 0
    if math.isclose(ratio, -1, rel_tol=1e-3):
        return ": is a sign flipped?"
    for n in range(2, 33):
        if math.isclose(ratio, n, rel_tol=1e-3) or math.isclose(ratio, 1 / n, rel_tol=1e-3):
            return f" (a factor of {n}): a sum in place of a mean, or a mean over the wrong thing?"
    return ""


def documented(script, *places):
    """Each pair of a text with {} in it and a number is in the docstring of the script."""
    prose = " ".join(script.__doc__.split())
    for text, number in places:
        text = text.format(float(number)).replace("-", "−")
        assert text in prose, f"the docstring of {script.__name__}.py does not say {text!r}"


def same(ours, expected, words, atol=1e-12):
    """Asserts that tensors are equal. `words` names the quantity and the likely mistake."""
    torch.testing.assert_close(ours, expected, atol=atol, rtol=0, msg=lambda x: f"{words}\n{x}")
