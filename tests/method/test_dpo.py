"""DPO and its relatives: the losses, the pairs, and the loop, against numbers by hand."""
import copy
import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from conftest import metrics_of, run_args
from safetensors.torch import load_file

import common
import dpo

LOSSES = ["dpo", "ipo", "hinge", "simpo", "orpo", "cpo"]
REFERENCE_FREE = ["simpo", "orpo", "cpo"]
CHAT = [{"role": "user", "content": "What is 1 + 1?"}]


def say(text):
    return [{"role": "assistant", "content": text}]


def pair_row(a, b, wrong, question="What is {a} + {b}?"):
    prompt = [{"role": "user", "content": question.format(a=a, b=b)}]
    return {"prompt": prompt, "chosen": say(f"{a} + {b} = {a + b}"), "rejected": say(wrong)}


# eleven prompts and answers of different lengths, so that no mean over rows, tokens or parts of the
# batch is another one by chance; and five that are held out
ROWS = [pair_row(3 * i, 7 + i, f"{3 * i} + {7 + i} = {i}" if i % 3 else "No.") for i in range(10)]
ROWS.append(pair_row(40, 2, "40 + 2 = 402 = 4", "Sam has {a} cups and gets {b} more. How many?"))
HELD_OUT = [pair_row(50 + i, i, f"{i} and {50 - i}", "Add {a} and {b}.") for i in range(5)]


@pytest.fixture(scope="module")
def tokenizer():
    return common.load_tokenizer("tiny/chat")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tokenizer):
    """A saved adapter that is far from doing nothing."""
    torch.manual_seed(5)
    model = common.load_model("tiny/chat", lora_rank=4)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    folder = tmp_path_factory.mktemp("adapter")
    common.save_model(model, tokenizer, folder)
    return str(folder)


@pytest.fixture
def run(tmp_path, write_jsonl, monkeypatch):
    """Runs dpo.py's train in this process on few rows; returns what it did and left behind."""
    def start(name="run", rows=ROWS, held_out=HELD_OUT, sampling=False, scoring=True, **flags):
        seen = SimpleNamespace(folder=tmp_path / name, batches=[], sampled=[])
        load, score = common.load_model, dpo.score_pairs

        def load_and_keep(*args, **kwargs):
            seen.model = load(*args, **kwargs)
            seen.start = copy.deepcopy(seen.model).double()
            return seen.model

        def score_and_keep(model, pairs, *args):
            if torch.is_grad_enabled():
                seen.batches.append(pairs)
            if scoring:
                return score(model, pairs, *args)
            return torch.zeros(len(pairs), requires_grad=True), torch.zeros(len(dpo.FIGURES))

        def keep_prompts(model, _, prompts, *rest):
            seen.sampled.append((prompts, *rest))
            return prompts

        flags = {"eval_size": 5, "batch_size": 4, "epochs": 1, "learning_rate": 2e-3,
                 "dataset": write_jsonl(rows), "output_dir": seen.folder} | flags
        if held_out:
            flags["eval_dataset"] = write_jsonl(held_out, "held_out.jsonl")
        with monkeypatch.context() as patch:
            patch.setattr(common, "load_model", load_and_keep)
            patch.setattr(dpo, "score_pairs", score_and_keep)
            if not sampling:
                patch.setattr(dpo, "sample_answers", keep_prompts)
            seen.args = run_args(dpo, **flags)
            dpo.train(seen.args)
        seen.metrics = metrics_of(seen.folder)
        seen.summary = json.loads((seen.folder / "summary.json").read_text())
        seen.saved = load_file(seen.folder / "adapter_model.safetensors")
        return seen
    return start


# ---- the loss ------------------------------------------------------------------------------------

def sums(seed, count=10):
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(count, dtype=torch.float64).uniform_(-9, -1, generator=generator)


def by_hand(loss, c, r, rc, rr, n, m, beta, epsilon=0.0, gamma=0.0):
    """The equations of the papers for one pair, in floats or tensors, and its two rewards."""
    c, r, rc, rr, n, m = (torch.as_tensor(x, dtype=torch.float64) for x in (c, r, rc, rr, n, m))

    def sigma(x):
        return 1 / (1 + torch.exp(-x))

    h = c - rc - (r - rr)
    odds_c = torch.exp(c / n) / (1 - torch.exp(c / n))
    odds_r = torch.exp(r / m) / (1 - torch.exp(r / m))
    clean, flipped = torch.log(sigma(beta * h)), torch.log(sigma(-beta * h))
    value = {
        "dpo": lambda: -(1 - epsilon) * clean - epsilon * flipped,
        "ipo": lambda: (h - 1 / (2 * beta)) ** 2,
        "hinge": lambda: torch.clamp(1 - beta * h, min=0),
        "simpo": lambda: -torch.log(sigma(beta * (c / n - r / m) - gamma)),
        "orpo": lambda: -c / n - beta * torch.log(sigma(torch.log(odds_c / odds_r))),
        "cpo": lambda: -torch.log(sigma(beta * (c - r))) - c}[loss]()
    if loss in ("simpo", "orpo"):
        return value, beta * c / n, beta * r / m
    if loss == "cpo":
        return value, beta * c, beta * r
    return value, beta * (c - rc), beta * (r - rr)


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_is_its_equation_written_out_and_differentiable(loss):
    """Two pairs of different lengths: the losses and rewards of the papers, and gradcheck."""
    logps, ref_logps = torch.tensor([-4.0, -2.5, -6.0, -7.0]), torch.tensor([-5.0, -2.0, -5.5, -9])
    lengths = torch.tensor([4, 2, 3, 5])
    logps, ref_logps = logps.double().requires_grad_(), ref_logps.double()
    if loss in REFERENCE_FREE:
        ref_logps = torch.zeros_like(ref_logps)
    smoothing = 0.2 if loss == "dpo" else 0.0
    losses, rewards = dpo.preference_loss(logps, ref_logps, lengths, loss, 0.5, smoothing, 0.3)
    for i in range(2):
        hand = by_hand(loss, logps[i], logps[i + 2], ref_logps[i], ref_logps[i + 2], lengths[i],
                       lengths[i + 2], 0.5, smoothing, 0.3)
        ours = [losses[i].item(), rewards[i].item(), rewards[i + 2].item()]
        assert ours == pytest.approx([x.item() for x in hand], abs=1e-12)
    assert losses.shape == (2,) and rewards.shape == (4,) and not rewards.requires_grad
    assert torch.autograd.gradcheck(lambda x: dpo.preference_loss(
        x, ref_logps, lengths, loss, 0.3, smoothing, 0.5)[0], logps)


def test_dpo_has_its_closed_form_gradient():
    """dL/dchosen = −β σ(−h), dL/drejected = +β σ(−h): what stands below eq. 7 in the paper."""
    logps, ref_logps = sums(0).requires_grad_(), sums(1)
    losses, rewards = dpo.preference_loss(logps, ref_logps, None, beta=0.4)
    losses.sum().backward()
    h = rewards[:5] - rewards[5:]
    assert torch.allclose(losses, torch.log1p(torch.exp(-h)))
    assert torch.allclose(logps.grad[:5], -0.4 * torch.sigmoid(-h))
    assert torch.allclose(logps.grad[5:], 0.4 * torch.sigmoid(-h))


def test_optima_of_the_losses():
    """Smoothed DPO is least at σ(margin) = 1 − ε, IPO at 1/(2β); hinge is flat beyond margin 1."""
    grid = torch.linspace(-5, 25, 60001, dtype=torch.float64)
    logps = torch.cat([grid, torch.zeros_like(grid)])
    zero = torch.zeros_like(logps)
    smooth = dpo.preference_loss(logps, zero, None, "dpo", 0.5, label_smoothing=0.1)[0]
    assert torch.sigmoid(0.5 * grid[smooth.argmin()]).item() == pytest.approx(0.9, abs=1e-3)
    ipo = dpo.preference_loss(logps, zero, None, "ipo", 0.1)[0]
    assert grid[ipo.argmin()].item() == pytest.approx(5, abs=1e-3)
    hinge = dpo.preference_loss(logps, zero, None, "hinge", 0.5)[0]
    assert (hinge[grid > 2] == 0).all() and (hinge[grid < 1.999] > 0).all()


def test_orpo_stays_finite_for_answers_that_are_certain():
    """In fp32 a log-prob of −1e-9 is a probability of 1, whose odds are infinite."""
    logps = torch.tensor([-1e-9, -1.0, -1e-9, -1.0, -1e-9, -1e-9], requires_grad=True)
    losses = dpo.preference_loss(logps, torch.zeros(6), torch.ones(6), "orpo")[0]
    losses.sum().backward()
    assert losses.isfinite().all() and logps.grad.isfinite().all()
    assert (logps.grad[:3] < 0).all() and logps.grad[1] < -1  # chosen ones are still raised


@pytest.mark.parametrize("loss", LOSSES)
def test_only_losses_with_a_reference_read_it(loss, tokenizer, monkeypatch):
    """SimPO, ORPO and CPO never touch the reference; the others read it once, without gradient."""
    calls = []

    def reference(model):
        calls.append(torch.is_grad_enabled())
        return nullcontext()

    monkeypatch.setattr(common, "reference", reference)
    pairs = [dpo.encode_pair(row, tokenizer, 64) for row in ROWS[:2]]
    args = run_args(dpo, loss=loss)
    losses, figures = dpo.score_pairs(common.load_model("tiny/chat"), pairs, args, 0)
    assert losses.isfinite().all() and figures.isfinite().all()
    assert calls == ([] if loss in REFERENCE_FREE else [False])


@pytest.mark.parametrize("dtype, scale", [(torch.bfloat16, 1.0), (torch.float16, 1024.0)])
def test_confident_tokens_keep_their_gradient_in_16_bits(dtype, scale):
    """Under autocast it is within 1% of that in fp32 for p from 0.9 to 0.99999, token by token."""
    hidden = torch.zeros(5, 16)  # numbers that 16 bits hold exactly, so that p is the same
    hidden[:, 0] = torch.tensor([6.5, 9.5, 12.0, 15.5, 18.5])
    head = torch.nn.Linear(16, 16, bias=False)
    head.weight.data = torch.eye(16)
    model = SimpleNamespace(get_output_embeddings=lambda: head,
                            config=transformers.PreTrainedConfig())
    gradients = []
    for enabled in False, True:
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=enabled):
            logps = dpo.chunk_logps(leaf, torch.zeros(5, dtype=torch.long), model, 1.3)
        (scale * logps.sum()).backward()
        gradients.append(leaf.grad / scale)
    p = (hidden / 1.3).softmax(-1)[:, 0]
    assert p[0] < 0.91 and p[-1] > 0.99998 and logps.dtype == torch.float32
    exact, rounded = gradients
    assert ((rounded - exact).norm(dim=1) < 0.01 * exact.norm(dim=1)).all()
    assert (rounded.sum(0) - exact.sum(0)).norm() < 0.01 * exact.sum(0).norm()


# ---- the pairs -----------------------------------------------------------------------------------

def trained_text(tokenizer, example):
    ids = zip(example["input_ids"], example["loss_mask"], strict=True)
    return tokenizer.decode([token for token, trained in ids if trained])


def test_all_forms_of_a_pair_give_the_same_tokens(tokenizer):
    """Messages: explicit and implicit prompt, prompt repeated in the answers, empty column."""
    two, three = say("1 + 1 = 2"), say("1 + 1 = 3")
    rows = [{"prompt": CHAT, "chosen": two, "rejected": three},
            {"chosen": CHAT + two, "rejected": CHAT + three},
            {"prompt": CHAT, "chosen": CHAT + two, "rejected": CHAT + three},
            {"prompt": [], "chosen": CHAT + two, "rejected": CHAT + three}]
    first, *others = [dpo.encode_pair(row, tokenizer, 64) for row in rows]
    assert all(other == first for other in others)
    header = "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(first["prompt"]) == header
    for side, answer in ("chosen", "1 + 1 = 2"), ("rejected", "1 + 1 = 3"):
        example = first[side]
        assert tokenizer.decode(example["input_ids"]).startswith(header + answer + "<|im_end|>")
        assert example["input_ids"][:len(first["prompt"])] == first["prompt"]
        assert trained_text(tokenizer, example) == answer + "<|im_end|>"
        assert example["attention_mask"] == [1] * len(example["input_ids"])


def test_only_the_answer_is_trained_behind_a_system_prompt_and_earlier_turns(tokenizer):
    """What the assistant said before is part of the prompt, whether that is explicit or not."""
    system = [{"role": "system", "content": "Add."}]
    prompt = [*system, *CHAT, *say("2"), {"role": "user", "content": "What is 2 + 2?"}]
    explicit = {"prompt": prompt, "chosen": say("4"), "rejected": say("5")}
    implicit = {"chosen": prompt + say("4"), "rejected": prompt + say("5")}
    pair = dpo.encode_pair(explicit, tokenizer, 200)
    assert pair == dpo.encode_pair(implicit, tokenizer, 200)
    assert trained_text(tokenizer, pair["chosen"]) == "4<|im_end|>"
    assert trained_text(tokenizer, pair["rejected"]) == "5<|im_end|>"


def test_tools_reach_the_template():
    """A row's tools are in the prompt of both sides, whether they are a list or its JSON."""
    tokenizer = common.load_tokenizer("tiny/chat")
    tools = "{% if tools %}<|im_start|>{{ tools[0].name }}<|im_end|>{% endif %}"
    tokenizer.chat_template = tools + tokenizer.chat_template
    for form in [{"name": "add"}], '[{"name": "add"}]':
        pair = dpo.encode_pair(ROWS[0] | {"tools": form}, tokenizer, 64)
        for ids in pair["prompt"], pair["chosen"]["input_ids"], pair["rejected"]["input_ids"]:
            assert tokenizer.decode(ids).startswith("<|im_start|>add<|im_end|><|im_start|>user")
    assert "add" not in tokenizer.decode(dpo.encode_pair(ROWS[0], tokenizer, 64)["prompt"])


def test_strings_end_in_eos_once_and_share_their_prompt_as_tokens(tokenizer):
    """Explicit and implicit prompt agree, and an answer that already ends in eos keeps one."""
    texts = {"chosen": " 1 + 1 = 2", "rejected": " 1 + 1 = 3"}
    explicit = dpo.encode_pair({"prompt": "Q: 1 + 1?"} | texts, tokenizer, 64)
    eos = {side: text + tokenizer.eos_token for side, text in texts.items()}
    assert dpo.encode_pair({"prompt": "Q: 1 + 1?"} | eos, tokenizer, 64) == explicit
    for side, text in texts.items():
        assert explicit[side]["input_ids"].count(tokenizer.eos_token_id) == 1
        assert trained_text(tokenizer, explicit[side]) == text + tokenizer.eos_token
    assert tokenizer.decode(explicit["prompt"]) == "Q: 1 + 1?"
    whole = {side: "Q: 1 + 1?" + text for side, text in texts.items()}
    implicit = dpo.encode_pair(whole, tokenizer, 64)
    for side in texts:
        assert implicit[side]["input_ids"] == explicit[side]["input_ids"]
    assert trained_text(tokenizer, implicit["chosen"]) == "2" + tokenizer.eos_token
    assert implicit["prompt"] == explicit["chosen"]["input_ids"][:-2]  # all but "2" and eos


@pytest.mark.parametrize("row", [
    {"prompt": "x", "chosen": "y"}, {"prompt": CHAT, "chosen": say("2"), "rejected": say("2")},
    {"prompt": "x", "chosen": say("2"), "rejected": "3"},
    {"chosen": say("2"), "rejected": say("3")}, {"question": 3.5, "chosen": "2", "rejected": "3"},
    {"ask": "1 + 1?", "chosen": "2", "rejected": "3"},
    {"prompt": CHAT, "chosen": say("2"), "rejected": 0.5},
    {"prompt": CHAT, "chosen": say("2"), "rejected": say("")[:0]},
    {"prompt": CHAT, "chosen": say("2"), "rejected": [{"role": "assistant", "text": "3"}]},
    {"chosen": CHAT + say("2"), "rejected": [{"role": "user", "content": "Hi"}] + say("2")},
    {"chosen": "Yes.", "rejected": "No."}, {"prompt": "x", "chosen": "", "rejected": "y"}])
def test_rows_that_cannot_be_used_are_dropped_and_counted(row, tokenizer, capsys):
    """The others stay, and the report names the number of the first that went."""
    examples = common.encode_rows("pairs", [ROWS[0], row], dpo.encode_pair, tokenizer, 64)
    assert len(examples) == 1
    assert "1 rows cannot be used, the first is row 2: " in capsys.readouterr().out


def test_truncation_keeps_the_end_of_the_prompt_and_never_empties_a_mask(tokenizer):
    """At every max_length: within it, one prompt for both sides, and answers begin at their start.

    The prompt keeps its end; it gives way first, but not beyond half of the room.
    """
    prompt = [{"role": "user", "content": "Add 1 and 2. " * 6}]
    row = {"prompt": prompt, "chosen": say("1 + 2 = 3 = 3 = 3"), "rejected": say("4")}
    whole = dpo.encode_pair(row, tokenizer, 1000)
    answers = {}
    for side in "chosen", "rejected":
        ids, start = whole[side]["input_ids"], len(whole["prompt"])
        assert ids[:start] == whole["prompt"] and whole[side]["loss_mask"].index(1) == start
        answers[side] = ids[start:]
    longest = len(whole["chosen"]["input_ids"])
    head = 3  # the header of the question, as there is no system message
    for max_length in range(8, longest + 2):
        pair = dpo.encode_pair(row, tokenizer, max_length)
        kept = len(pair["prompt"])
        end = whole["prompt"][len(whole["prompt"]) - kept + head:]
        assert pair["prompt"] == whole["prompt"][:head] + end
        room = max(max_length // 2, head + max_length // 4)
        assert kept == max(len(whole["prompt"]) - max(0, longest - max_length), room)
        assert pair["truncated"] == (max_length < longest)
        for side in "chosen", "rejected":
            example = pair[side]
            assert example["input_ids"] == (pair["prompt"] + answers[side])[:max_length]
            assert example["loss_mask"].index(1) == kept
            assert len(example["loss_mask"]) == len(example["input_ids"]) <= max_length
            assert len(example["attention_mask"]) == len(example["input_ids"])


def test_collate_masks_by_length_though_pad_is_eos(tokenizer):
    """Where pad has the id of eos, the eos that ends an answer is read and trained all the same."""
    pairs = [dpo.encode_pair(row, tokenizer, 64) for row in ROWS]
    examples = [pair["rejected"] for pair in pairs]
    batch = dpo.collate(examples, tokenizer.eos_token_id, "cpu")
    width = max(len(example["input_ids"]) for example in examples)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        padding = [0] * (width - length)
        pads = [tokenizer.eos_token_id] * (width - length)
        assert batch["input_ids"][row].tolist() == example["input_ids"] + pads
        assert batch["attention_mask"][row].tolist() == [1] * length + padding
        assert batch["loss_mask"][row].tolist() == example["loss_mask"] + padding


def test_real_preferences_become_masked_pairs(shared):
    """With Qwen2.5's tokenizer, what is trained is the answer and the token that ends it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        shared / "tokenizers/Qwen2.5-0.5B-Instruct")
    for name in ("pref_hh_string", "pref_hh_implicit_prompt", "pref_hh_conversational",
                 "pref_dpo_mix_conversational"):
        with open(shared / f"data/{name}.jsonl") as file:
            rows = [json.loads(line) for line in list(file)[:40]]
        for row in rows:
            pair = dpo.encode_pair(row, tokenizer, 10**6)
            for side in "chosen", "rejected":
                text, ids = trained_text(tokenizer, pair[side]), pair[side]["input_ids"]
                start = pair[side]["loss_mask"].index(1)
                assert 0 < start == len(pair["prompt"])
                if "conversational" in name:
                    assert text == row[side][0]["content"] + "<|im_end|>"
                elif "implicit" in name:
                    assert tokenizer.decode(ids) == row[side] + tokenizer.eos_token
                else:
                    assert text == row[side] + tokenizer.eos_token
                    assert tokenizer.decode(pair["prompt"]) == row["prompt"]


def test_real_strings_train_a_real_model(shared, run):
    """Pairs of strings on a small Llama: the loss starts at log 2."""
    with open(shared / "data/pref_hh_string.jsonl") as file:
        rows = [json.loads(line) for line in list(file)[:30]]
    seen = run(model=shared / "models/stories260K", rows=rows, held_out=[], max_steps=1,
               sampling=True)
    assert seen.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


# ---- the loop, against a plain one in float64 ----------------------------------------------------

def expected_examples(tokenizer, rows):
    """What the template prints of each pair: prompt ids, and answer ids with their end of turn."""
    examples = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=False)
        sides = [tokenizer(row[side][0]["content"] + "<|im_end|>").input_ids
                 for side in ("chosen", "rejected")]
        examples.append((prompt, *sides))
    return examples


def row_number(pair, examples):
    """Which row it is that the loop was given."""
    for number, (prompt, chosen, _) in enumerate(examples):
        if pair["chosen"]["input_ids"][:len(prompt + chosen)] == prompt + chosen:
            return number
    raise AssertionError("the loop was given a pair that is no row of the data")


def answer_logp(model, prompt, answer):
    """log p(answer | prompt), from all logits of one sequence without padding."""
    ids = torch.tensor([prompt + answer])
    logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[len(prompt) - 1:, 0].sum()


def figures_by_hand(model, reference, examples, args):
    """The mean over pairs of all that is logged, as tensors."""
    rows = []
    for prompt, chosen, rejected in examples:
        c, r = answer_logp(model, prompt, chosen), answer_logp(model, prompt, rejected)
        with torch.no_grad():
            rc = answer_logp(reference, prompt, chosen)
            rr = answer_logp(reference, prompt, rejected)
        n, m = len(chosen), len(rejected)
        loss, chosen_reward, rejected_reward = by_hand(
            args.loss, c, r, rc, rr, n, m, args.beta, args.label_smoothing, args.gamma)
        margin = chosen_reward - rejected_reward
        rows.append({
            "loss": loss, "accuracy": (margin.sign() + 1) / 2, "margin": margin,
            "chosen_reward": chosen_reward, "rejected_reward": rejected_reward,
            "chosen_logp": c, "rejected_logp": r})
    return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}


def train_by_hand(seen, tokenizer):
    """The batches that the loop saw, with Adam as in its paper: figures per step, and the model."""
    examples = expected_examples(tokenizer, ROWS)
    model, reference = seen.start, copy.deepcopy(seen.start)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    first = {name: torch.zeros_like(p) for name, p in weights.items()}
    second = {name: torch.zeros_like(p) for name, p in weights.items()}
    order = [row_number(pair, examples) for pairs in seen.batches for pair in pairs]
    logged = []
    # 3 steps: a batch of 4, another one, and what is left; the cosine of 0, 60 and 120 degrees
    for t, (rows, rate) in enumerate([(order[:4], 1), (order[4:8], 0.75), (order[8:], 0.25)], 1):
        figures = figures_by_hand(model, reference, [examples[i] for i in rows], seen.args)
        gradients = torch.autograd.grad(figures["loss"], weights.values())
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        rate *= seen.args.learning_rate
        logged.append({name: value.item() for name, value in figures.items()}
                      | {"step": t, "grad_norm": norm.item(), "learning_rate": rate})
        for (name, p), g in zip(weights.items(), gradients, strict=True):
            g = g * min(1, 1 / norm)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            step = first[name] / (1 - 0.9**t) / ((second[name] / (1 - 0.999**t)).sqrt() + 1e-8)
            p.data -= rate * step
    return logged, model, reference


@pytest.mark.parametrize("flags", [
    {"micro_batch_size": 1}, {"micro_batch_size": 3, "model": "adapter"},
    {"micro_batch_size": 100, "loss": "ipo"},
    *({"micro_batch_size": 3, "loss": loss} for loss in LOSSES[2:])], ids=str)
def test_the_loop_does_what_a_plain_one_does_by_hand(flags, run, adapter, tokenizer):
    """Every figure of every step, gradient norms, the weights at the end, and what is held out.

    Label smoothing, β and γ other than the default, unequal lengths, a last batch that is short.
    """
    smoothing = 0.2 if "loss" not in flags else 0.0
    flags = {"beta": 0.7, "gamma": 0.4, "label_smoothing": smoothing} | flags
    if "model" in flags:
        flags["model"] = adapter
    seen = run(**flags)
    before = {name: p.clone() for name, p in seen.start.named_parameters()}
    logged, model, reference = train_by_hand(seen, tokenizer)
    assert len(seen.metrics) == 3
    for ours, hand in zip(seen.metrics, logged, strict=True):
        for name, value in hand.items():
            assert ours[name] == pytest.approx(value, rel=2e-4, abs=2e-5), (ours["step"], name)
    if seen.args.loss not in ("simpo", "orpo"):
        assert max(x["grad_norm"] for x in logged) > 1.5  # so that clipping matters
    for name, p in seen.model.named_parameters():
        moved, wrong = model.get_parameter(name) - before[name], p - model.get_parameter(name)
        assert ("lora" in name and "default" in name) == bool(moved.abs().max() > 0), name
        # the median, because Adam's step for a gradient that is all but 0 has the sign of its noise
        assert wrong.abs().median() <= 1e-4 * moved.abs().median() + 1e-9, name
        assert wrong.abs().mean() <= 5e-3 * moved.abs().mean() + 1e-9, name
    held_out = expected_examples(tokenizer, HELD_OUT)
    for when, policy in ("before", reference), ("after", model):
        with torch.no_grad():
            hand = figures_by_hand(policy, reference, held_out, seen.args)
        assert set(seen.summary[when]) == set(hand) == set(dpo.FIGURES)
        for name, value in hand.items():
            ours = seen.summary[when][name]
            assert ours == pytest.approx(value.item(), rel=1e-3, abs=1e-4), (when, name)


def test_training_starts_at_log_2_and_a_tie(run, adapter):
    """The policy is its own reference at first, though what it starts from is an adapter."""
    for name, model in ("base", "tiny/chat"), ("adapter", adapter):
        seen = run(name, model=model, max_steps=1, load_in_4bit="on" if name == "base" else "off")
        for figures in seen.metrics[0], seen.summary["before"]:
            assert figures["loss"] == pytest.approx(math.log(2), abs=1e-6)
            assert figures["margin"] == figures["chosen_reward"] == 0
            assert figures["accuracy"] == 0.5
        assert seen.summary["load_in_4bit"] == (name == "base")
        assert seen.summary["after"]["loss"] != seen.summary["before"]["loss"]


@pytest.mark.parametrize("what", ["rate", "clip"])
def test_nothing_moves_at_rate_0_or_clipped_to_nothing(what, run, adapter, monkeypatch):
    """What moves the weights is the optimizer alone, along the gradient that was clipped."""
    if what == "rate":
        monkeypatch.setattr(dpo, "learning_rate", lambda *args: 0.0)
    else:
        clip = torch.nn.utils.clip_grad_norm_
        monkeypatch.setattr(
            torch.nn.utils, "clip_grad_norm_", lambda weights, norm: clip(weights, norm * 1e-13))
    seen = run(model=adapter)
    for name, weight in load_file(adapter + "/adapter_model.safetensors").items():
        assert (seen.saved[name] - weight).abs().max() < (1e-12 if what == "rate" else 1e-7), name
    assert all(step["grad_norm"] > 0.01 for step in seen.metrics)


def test_the_order_covers_the_data_once_an_epoch_and_never_what_is_held_out(run, tokenizer):
    """Two epochs of the same pairs in two orders that follow from the seed."""
    rows = ROWS + [row | {"rejected": say("I do not know.")} for row in ROWS]
    examples = expected_examples(tokenizer, ROWS)
    orders = []
    for seed in 0, 1:
        seen = run(f"seed{seed}", rows=rows, held_out=[], eval_size=3, seed=seed, epochs=2,
                   batch_size=1, scoring=False)
        order = []
        for pair in sum(seen.batches, []):
            row = row_number(pair, examples)
            unknown = "know" in tokenizer.decode(pair["rejected"]["input_ids"])
            order.append((row, unknown))
        half = len(order) // 2
        assert len(set(order[:half])) == half and set(order[:half]) == set(order[half:])
        assert order[:half] != order[half:]
        held_out = set(range(len(ROWS))) - {row for row, _ in order}
        assert 2 <= len(held_out) <= 3  # of some prompts both pairs, and no prompt is on both sides
        assert half == 2 * (len(ROWS) - len(held_out))
        orders.append(order)
    assert orders[0] != orders[1]


def test_pairs_of_similar_length_share_a_pass_and_the_last_batch_is_short(run):
    """A batch holds what the order says, whatever its order by length."""
    plain, sorted_by_length = (
        run(f"size{size}", held_out=ROWS[:1], epochs=2, batch_size=size, micro_batch_size=size,
            scoring=False).batches for size in (1, 5))
    order, taken = sum(plain, []), 0
    for batch in sorted_by_length:
        assert len(batch) == min(5, len(order) - taken)
        expected = order[taken:taken + len(batch)]
        assert sorted(map(str, batch)) == sorted(map(str, expected))
        lengths = [max(len(pair[side]["input_ids"]) for side in ("chosen", "rejected"))
                   for pair in batch]
        assert lengths == sorted(lengths)
        taken += len(batch)
    assert taken == len(order) > 10 and taken % 5


def test_the_order_of_the_same_data_and_the_samples_follow_from_the_seed(run, tokenizer):
    """Answers to the same held-out prompts are sampled before and after, with the same seed."""
    runs = [run(f"seed{seed}", seed=seed, scoring=False) for seed in (3, 4)]
    assert runs[0].batches != runs[1].batches
    prompts = [prompt for prompt, _, _ in expected_examples(tokenizer, HELD_OUT[:3])]
    for seed, seen in zip((3, 4), runs, strict=True):
        assert seen.sampled == [(prompts, 64, seed)] * 2


def test_max_steps_ends_a_run_early(run):
    """The rate of the last step is that of a run with so many steps, not of a longer one."""
    seen = run(max_steps=2, batch_size=2, epochs=3, scoring=False)
    assert [step["step"] for step in seen.metrics] == [1, 2] and len(seen.batches) == 2
    rates = [step["learning_rate"] for step in seen.metrics]
    assert rates == pytest.approx([2e-3, 1e-3])  # a cosine at 0 and 90 degrees


# ---- evaluation, samples, and what is left behind ------------------------------------------------

def state_of(model):
    modes = [module.training for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    return modes, flags, model.active_adapter, causal_flags(model), weights


def causal_flags(model):
    causal = common.causal_lm(model)
    return causal.config.use_cache, causal.is_gradient_checkpointing


def assert_same_state(before, after):
    assert before[:4] == after[:4]
    for old, new in zip(before[4], after[4], strict=True):
        assert torch.equal(old, new)


def test_evaluating_and_sampling_leave_the_model_as_it_was(adapter, tokenizer):
    """Mode, adapter, what is trainable, weights, cache flags; evaluating, also random numbers."""
    model = common.load_model(adapter, gradient_checkpointing="on")
    before, seed = state_of(model), torch.get_rng_state()
    pairs = [dpo.encode_pair(row, tokenizer, 64) for row in HELD_OUT]
    dpo.evaluate(model, pairs, run_args(dpo, loss="dpo"), tokenizer.pad_token_id)
    assert_same_state(before, state_of(model))
    assert torch.equal(seed, torch.get_rng_state())
    dpo.sample_answers(model, tokenizer, [pair["prompt"] for pair in pairs], 4, 0)
    assert_same_state(before, state_of(model))


def test_a_run_with_evaluations_trains_to_the_same_weights(run):
    """Also its figures are the same, and what it logs of the last step is what it reports."""
    without, with_them = run("without"), run("with", eval_every=3)
    for name, weight in without.saved.items():
        assert torch.equal(weight, with_them.saved[name]), name
    for a, b in zip(without.metrics, with_them.metrics, strict=True):
        assert all(a[name] == b[name] for name in (*dpo.FIGURES, "grad_norm", "learning_rate"))
        assert ("eval_loss" in b) == (b["step"] == 3) and "eval_loss" not in a
    for name, value in with_them.summary["after"].items():
        assert with_them.metrics[-1][f"eval_{name}"] == value


def sample_by_hand(model, prompts, stops, pad, length, seed):
    """One token after another from the full softmax of each prompt alone."""
    torch.manual_seed(seed)
    answers = [[] for _ in prompts]
    for _ in range(length):
        if all(set(answer) & stops for answer in answers):
            break
        probs = []
        for prompt, answer in zip(prompts, answers, strict=True):
            probs.append(model(input_ids=torch.tensor([prompt + answer])).logits[0, -1].softmax(-1))
        for answer, token in zip(answers, torch.multinomial(torch.stack(probs), 1), strict=True):
            answer.append(pad if set(answer) & stops else token.item())
    return answers


@torch.no_grad()
def test_answers_are_sampled_from_the_model_until_a_stop_token(adapter):
    """From the whole softmax, whatever the model's own generation config says of sampling.

    An answer ends at eos, at the template's end of turn, and at what that config names.
    """
    model = common.load_model(adapter, gradient_checkpointing="on")
    tokenizer = common.load_tokenizer("tiny/chat")
    pairs = [dpo.encode_pair(row, tokenizer, 64) for row in HELD_OUT[:2] + ROWS[-1:]]
    prompts = [pair["prompt"] for pair in pairs]
    plus = tokenizer("1 +").input_ids[-1]
    end, pad = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.pad_token_id
    tokenizer.eos_token = "<|im_start|>"
    awkward = dict(
        temperature=5.0, top_k=1, top_p=0.1, min_p=0.9, typical_p=0.2, repetition_penalty=3.0,
        no_repeat_ngram_size=1, do_sample=False, max_new_tokens=2)
    for own, stops in (2, {end}), ([plus, 2], {end, plus}):
        model.generation_config = transformers.GenerationConfig(eos_token_id=own, **awkward)
        ours = dpo.sample_answers(model, tokenizer, prompts, 24, 3)
        model.eval()
        stops.add(tokenizer.convert_tokens_to_ids("<|im_start|>"))
        assert ours == sample_by_hand(model, prompts, stops, pad, 24, 3)
        model.train()
    assert any(plus in answer for answer in ours)
    assert ours != dpo.sample_answers(model, tokenizer, prompts, 24, 4)


def test_what_a_run_saves(run, adapter, tokenizer, monkeypatch):
    """One adapter in fp32 and nothing else of the model: peft alone reproduces the result.

    The folder holds no state to go on from, and keeps its flags, data and figures.
    """
    seen = run(model=adapter, label_smoothing=0.1, sampling=True)
    files = {path.name for path in seen.folder.iterdir()}
    assert {"args.json", "summary.json", "metrics.jsonl", "adapter_config.json"} <= files
    assert not [name for name in files if "resume" in name or name.endswith(".new")]
    assert [path.name for path in seen.folder.rglob("*.safetensors")] == [
        "adapter_model.safetensors"]
    assert all("lora_" in name for name in seen.saved)
    assert {weight.dtype for weight in seen.saved.values()} == {torch.float32}
    assert len(seen.saved) == sum(p.requires_grad for p in seen.model.parameters())
    monkeypatch.chdir(common.HERE)
    fresh = peft.AutoPeftModelForCausalLM.from_pretrained(seen.folder, dtype=torch.float32).double()
    with torch.no_grad():
        hand = figures_by_hand(
            fresh, seen.start, expected_examples(tokenizer, HELD_OUT), seen.args)
    for name, value in seen.summary["after"].items():
        assert value == pytest.approx(hand[name].item(), abs=1e-4), name
    expected = {"method": "dpo", "label_smoothing": 0.1, "dtype": "torch.float32", "step": 3}
    assert expected.items() <= seen.summary.items()
    assert json.loads((seen.folder / "args.json").read_text())["label_smoothing"] == 0.1


def test_the_run_shows_what_is_trained_in_green(run, capsys):
    """Both answers of one pair with their end of turn, and nothing of the prompt."""
    run(max_steps=1)
    green = [part.split("\033[0m")[0] for part in capsys.readouterr().out.split("\033[32m")[1:]]
    assert green == ["0 + 7 = 7<|im_end|>", "No.<|im_end|>"]


# ---- 16 bits without a GPU, and going on ---------------------------------------------------------

@pytest.fixture
def loss_scaling(monkeypatch):
    """The GradScaler of a T4, on the CPU."""
    monkeypatch.setattr(
        common, "grad_scaler", lambda model: torch.amp.GradScaler("cpu", init_scale=2.0**13))


def test_a_run_with_a_loss_scale_agrees_with_one_without(run, loss_scaling, monkeypatch):
    """Scaling by a power of two is exact: all figures, norms before clipping, and weights."""
    scaled = run("scaled", beta=0.7)
    monkeypatch.setattr(common, "grad_scaler", lambda model: torch.amp.GradScaler(enabled=False))
    plain = run("plain", beta=0.7)
    for a, b in zip(scaled.metrics, plain.metrics, strict=True):
        for name in (*dpo.FIGURES, "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-9), name
        assert a["loss_scale"] == 2.0**13 and b["loss_scale"] == 1
    assert max(step["grad_norm"] for step in plain.metrics) > 1  # clipping before unscaling shows
    for name, weight in scaled.saved.items():
        assert torch.allclose(weight, plain.saved[name], rtol=1e-5, atol=1e-8), name


def test_runs_in_16_bits_agree_with_one_in_fp32(run, monkeypatch):
    """Base and forward passes in 16 bits: the loss starts at log 2, trained weights are in fp32."""
    small = {"beta": 0.1}  # or β magnifies the rounding of log-probs
    full, scaler = run("fp32", **small), torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kwargs: scaler(
        *args, **kwargs, init_scale=2.0**8))  # at its default, it first has to skip some steps
    for dtype in torch.float16, torch.bfloat16:
        with monkeypatch.context() as patch:
            patch.setattr(common, "choose_dtype", lambda device, dtype=dtype: dtype)
            patch.setattr(common, "autocast", lambda _, dtype=dtype: torch.autocast("cpu", dtype))
            half = run(str(dtype), **small)
        assert half.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert half.metrics[0]["loss_scale"] == (2**8 if dtype == torch.float16 else 1)
        for name, p in half.model.named_parameters():
            assert p.dtype == (torch.float32 if p.requires_grad else dtype), name
        for a, b in zip(full.metrics, half.metrics, strict=True):
            for name in "loss", "chosen_logp", "rejected_logp", "grad_norm":
                assert a[name] == pytest.approx(b[name], rel=0.05), (a["step"], name)
        assert {weight.dtype for weight in half.saved.values()} == {torch.float32}


def stop_at(step, monkeypatch, log_step=dpo.log_step):
    """The run ends as by Ctrl-C, once it has logged this step and before it can save it."""
    def log_and_stop(args, state, metrics, *rest):
        log_step(args, state, metrics, *rest)
        if metrics["step"] == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(dpo, "log_step", log_and_stop)


def test_an_overflow_skips_a_step_and_going_on_knows_of_it(run, loss_scaling, monkeypatch):
    """The second step overflows: no weight changes, the scale is halved, the norm is not a number.

    A run that is interrupted behind it ends, by the same command, with the same bits.
    """
    score, update, weights = dpo.score_pairs, dpo.update, []

    def overflow(model, pairs, *args):
        losses, figures = score(model, pairs, *args)
        is_second = torch.is_grad_enabled() and 4 <= len(overflow.seen) < 8
        overflow.seen += pairs if torch.is_grad_enabled() else []
        return losses * (1e38 if is_second else 1), figures

    def update_and_keep(optimizer, scaler, rate):
        assert {p.dtype for p in optimizer.param_groups[0]["params"]} == {torch.float32}
        metrics = update(optimizer, scaler, rate)
        weights.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])
        return metrics

    monkeypatch.setattr(dpo, "score_pairs", overflow)
    monkeypatch.setattr(dpo, "update", update_and_keep)
    # it holds until a process ends
    monkeypatch.setattr(dpo.filelock.FileLock, "acquire", lambda *args, **kwargs: None)
    overflow.seen = []
    whole = run("whole", save_every=2)
    scales = [step["loss_scale"] for step in whole.metrics]
    assert scales == [2.0**13, 2.0**12, 2.0**12]
    assert [step["grad_norm"] is None for step in whole.metrics] == [False, True, False]
    first, second, third = weights
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(second, third, strict=True))

    overflow.seen = []
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            run("stopped", save_every=2)
    overflow.seen = overflow.seen[:8]  # it goes on behind the step that overflowed
    rest = run("stopped", save_every=2)
    assert len(rest.batches) == 1 and len(rest.metrics) == 3
    for a, b in zip(whole.metrics, rest.metrics, strict=True):
        clock = {"seconds": 0, "tokens_per_second": 0, "peak_memory_gib": 0}
        assert a | clock == b | clock
    for name, weight in whole.saved.items():
        assert torch.equal(weight, rest.saved[name]), name
    for when in "before", "after":
        assert whole.summary[when] == rest.summary[when]


def test_a_gradient_that_is_not_finite_ends_a_run_without_a_loss_scale(run, refused, monkeypatch):
    """In one line that names the flag; the weights that were saved stay."""
    score = dpo.score_pairs
    monkeypatch.setattr(dpo, "score_pairs", lambda *args: (score(*args)[0] * math.nan,
                                                           score(*args)[1]))
    assert "--learning-rate" in refused(run)
