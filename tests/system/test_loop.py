"""What all scripts share: log-probs, clipping, the learning rate, and the loop around a method.

Functions of the same name are identical in all scripts (tests/project/test_form.py), so they are
tested here once, on sft.py. The loops are not identical, so each is tested. tests/method shows that
a loop computes the right numbers; here it must compute the same numbers in another way.
"""
import itertools
import math
import re
from types import SimpleNamespace

import peft
import pytest
import runs_helper
import torch
import transformers
from by_hand import Run, answer_to, ask, close, logps, move, prompt_ids, say, tokenizer
from conftest import ROOT
from torch import nn
from transformers import PreTrainedConfig

import common
import distill
import dpo
import grpo
import kto
import online_dpo
import ppo
import prm
import reward_model
import sft

OFFLINE, ONLINE = [sft, reward_model, prm, dpo, kto], [online_dpo, ppo, grpo, distill]
OF_SCRIPTS = pytest.mark.parametrize("script", OFFLINE + ONLINE, ids=lambda x: x.__name__)

# ---- log-probs -----------------------------------------------------------------------------------


def small_model(tied=False, train_head=False):
    """A model with large weights, so that attention to a wrong token would show."""
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
        initializer_range=0.5))
    model.get_output_embeddings().weight.requires_grad_(train_head)
    return model


def examples():
    """Answers of several lengths, one with a user turn in it. 0 is also the pad token."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for length, mask in (9, "001110011"), (4, "0011"), (7, "0011111"), (5, "01000"):
        ids = torch.randint(0, 41, (length,), generator=generator).tolist()
        made.append({"input_ids": [0] + ids[1:-1] + [0], "attention_mask": [1] * length,
                     "loss_mask": list(map(int, mask))})
    return made


class Head(nn.Module):
    """A head that claims a vocabulary so large that a chunk has `chunk` positions."""

    def __init__(self, head, chunk):
        super().__init__()
        self.head, self.sizes = head, []
        self.register_buffer("weight", torch.empty(2**24 // chunk, 0))

    def forward(self, hidden):
        self.sizes.append(len(hidden))
        return self.head(hidden)


@pytest.mark.parametrize("tied, train_head", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_log_probs_and_their_gradients_are_those_of_all_logits(tied, train_head, chunk):
    """For any chunk size, padding and trained weights. Log-probs are 0 where the mask is 0."""
    model, rows = small_model(tied, train_head), examples()
    head = Head(model.get_output_embeddings(), chunk)
    weights = [p for p in model.parameters() if p.requires_grad]
    model.get_output_embeddings = lambda: head
    batch = sft.collate(rows, 0, "cpu")  # plus one column that is padding in every row
    batch = {name: nn.functional.pad(x, (0, 1)) for name, x in batch.items()}
    ours = sft.token_logps(model, batch, 1.5)  # [B, T-1]
    trained = batch["loss_mask"][:, 1:].bool()
    factors = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)) * trained
    gradients = torch.autograd.grad((ours * factors).sum(), weights)
    count = trained.sum().item()
    assert max(head.sizes) == min(chunk, count), "positions per chunk of logits"
    assert sum(head.sizes) == 2 * count, "each chunk is read twice: forward, and again backward"
    total = 0.0
    for row, line, factor in zip(rows, ours, factors, strict=True):
        every = logps(model, row["input_ids"][:1], row["input_ids"][1:], 1.5)
        mask = torch.tensor(row["loss_mask"][1:])
        assert torch.allclose(line[:len(mask)], every * mask, atol=1e-5)
        assert not line[len(mask):].any(), "padding has a log-prob"
        total += (factor[:len(mask)] * every).sum()
    for ours, expected in zip(gradients, torch.autograd.grad(total, weights), strict=True):
        assert expected.abs().max() > 1e-3 and (ours - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_confident_tokens_keep_their_gradient_in_16_bits(dtype, temperature):
    """From p = 0.9 to 0.99999: within 1% of softmax − one-hot in fp32, per token and in sum.

    A logit divided by a temperature is not a 16-bit number. If it is rounded, it is off by 3%.
    """
    chosen = torch.tensor([3.25, 5.5, 7.75, 10.25, 12.75])  # exact in 16 bits
    hidden = torch.zeros(1, 6, 4)
    hidden[0, :5, 0] = chosen
    hidden.requires_grad_()
    head = nn.Linear(4, 4, bias=False)
    head.weight.data = torch.eye(4)  # so that the logits are the hidden states
    model = SimpleNamespace(base_model=lambda **inputs: (hidden,), config=PreTrainedConfig(),
                            get_output_embeddings=lambda: head)
    batch = {"input_ids": torch.zeros(1, 6, dtype=torch.long), "attention_mask": torch.ones(1, 6),
             "loss_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        ours = sft.token_logps(model, batch, temperature)
    assert ours.dtype == torch.float32
    (1024 * ours.sum()).backward()  # scaled as by a GradScaler
    probabilities = (hidden[0, :5].detach() / temperature).softmax(-1)  # [5, 4]
    expected = (torch.tensor([1.0, 0.0, 0.0, 0.0]) - probabilities) / temperature
    gradient = hidden.grad[0, :5] / 1024
    assert ((gradient - expected).norm(dim=1) < 0.01 * expected.norm(dim=1)).all()
    assert (gradient.sum(0) - expected.sum(0)).norm() < 0.01 * expected.sum(0).norm()
    of_head = expected.T @ chosen
    assert (head.weight.grad[:, 0] / 1024 - of_head).norm() < 0.01 * of_head.norm()


# ---- sampled answers -----------------------------------------------------------------------------

@torch.no_grad()
def sample_by_hand(model, prompts, stops, length, seed):
    """Samples token by token from the whole softmax, with one forward pass per prompt."""
    torch.manual_seed(seed)
    answers = [[] for _ in prompts]
    for _ in range(length):
        probs = [model(torch.tensor([prompt + answer])).logits[0, -1].softmax(-1)
                 for prompt, answer in zip(prompts, answers, strict=True)]
        for answer, token in zip(answers, torch.multinomial(torch.stack(probs), 1), strict=True):
            if not set(answer) & stops:
                answer.append(token.item())
    return answers


def test_answers_are_sampled_from_the_model_until_a_stop_token():
    """Eos, the end of turn or a token of the generation config, whose other fields are ignored.

    A prompt too long for the model and an answer loses its start.
    """
    model = common.load_model("tiny/chat", gradient_checkpointing="on")
    tokenizer = common.load_tokenizer("tiny/chat")
    move(model, std=0.1)
    plus, end = tokenizer("1 +").input_ids[-1], tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token, tokenizer.model_max_length = "<|im_start|>", 44
    prompts = [prompt_ids(ask(f"What is {i} + 1?" * (1 + 2 * i))) for i in range(4)]
    assert max(map(len, prompts)) > 44 - 24 > min(map(len, prompts))
    kept = [prompt[-(44 - 24):] for prompt in prompts]
    awkward = dict(
        temperature=5.0, top_k=1, top_p=0.1, min_p=0.9, typical_p=0.2, repetition_penalty=3.0,
        no_repeat_ngram_size=1, do_sample=False, num_beams=3, max_length=3, bad_words_ids=[[plus]])
    for own, stops in (end, {end}), ([plus, end], {plus, end}):
        model.generation_config = transformers.GenerationConfig(eos_token_id=own, **awkward)
        ours = sft.sample_answers(model, tokenizer, prompts, 24, 3)
        assert model.training, "left in evaluation mode"
        stops.add(tokenizer.eos_token_id)
        expected = sample_by_hand(model.eval(), kept, stops, 24, 3)
        assert ours == expected, f"stop tokens {own}"
        assert len(set(map(len, ours))) > 1, "this test needs answers that end one after another"
        model.train()
    assert any(plus in answer for answer in ours)


# ---- rows and runs -------------------------------------------------------------------------------

def rows_of(script, count, first=0):
    """Rows of very different lengths. No two prompts are the same."""
    rows = []
    for i in range(first, first + count):
        prompt = ask(f"Add {i}" + " and 1" * (i % 4))
        good, bad = say(f"{i} + {i % 4}" + " = 7" * (i % 3)), say(f"{i} + 1" + " = 8" * (i % 5))
        row = {"prompt": prompt, "chosen": good, "rejected": bad}
        if script is sft:
            row = {"messages": prompt + good + (ask("And 3?") + say("3") if i % 2 else [])}
        elif script is prm:
            steps = [f"{i} + {step}" + " = 7" * (i % 3) for step in range(1 + i % 4)]
            labels = [(i + step) % 3 > 0 for step in range(len(steps))]
            row = {"prompt": prompt, "completions": steps, "labels": labels}
        elif script is kto:
            row = {"prompt": prompt, "completion": good if i % 3 else bad, "label": i % 3 > 0}
        elif script in ONLINE:
            row = {"prompt": prompt, "answer": str(i)}
        rows.append(row)
    return rows


def fixed_sample(model, tokenizer, prompts, copies, args, seed):
    """Answers that depend on the prompt and, in online_dpo.py, on which of two draws it is."""
    if hasattr(args, "preference"):
        return [answer_to(prompt, seed % 2) for prompt in prompts]
    return [answer_to(prompt, number) for prompt in prompts for number in range(copies)]


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Three steps on a model of one layer, in batches of five; offline, the last has one row."""
    data = tmp_path_factory.mktemp("data")
    runs_helper.write_data(data)

    def start(script, folder, fixed=True, replace=None, rows=11, **flags):
        given = {"model": data / "chat", "batch_size": 5, "micro_batch_size": 5, "max_steps": 3,
                 "eval_size": 4}
        replace = dict(replace or {})
        if script in ONLINE:
            given |= {"max_new_tokens": 12, "temperature": 1.3}
            if fixed:
                replace["sample_mixture" if script is online_dpo else "sample"] = fixed_sample
        if script is distill:
            given |= {"model": "tiny/chat", "teacher": "tiny/teacher"}
        elif script in ONLINE:
            given["reward"] = f"{ROOT}/examples/rewards.py:shortness"
        if script is ppo:
            given |= {"epochs": 2, "minibatches": 2, "target_kl": 1e6}
        if script is grpo:
            given |= {"group_size": 2, "updates": 2, "loss": "dapo", "beta": 0.1, "max_rounds": 3}
        if script is sft:
            given |= {"max_new_tokens": 2}
        held_out = rows_of(script, 4, first=20) if rows == 11 else None
        return Run(script, folder, rows_of(script, rows), held_out, replace=replace,
                   **given | flags)
    return start


@pytest.fixture(scope="module")
def plain_run(train, tmp_path_factory):
    """A run to compare with; each is made once."""
    made = {}

    def get(script, **options):
        key = script, str(options)
        if key not in made:
            made[key] = train(script, tmp_path_factory.mktemp("plain"), **options)
        return made[key]
    return get


def assert_same_run(run, other, rel=1e-8):
    """Compares the figures of every step, the held-out figures and the saved weights."""
    for ours, line in zip(run.metrics, other.metrics, strict=True):
        expected = {name: value for name, value in line.items()
                    if not re.search("second|memory|loss_scale", name)}
        close(ours, expected, f"step {line['step']}", rel)
    for when in "before", "after":
        close(run.summary[when], other.summary[when], when, rel)
    for name, weight in other.saved.items():
        assert (run.saved[name] - weight).norm() <= 10 * rel * weight.norm() + 1e-12, name


# ---- a batch may be computed in any way ----------------------------------------------------------

@OF_SCRIPTS
def test_micro_batches_add_up_to_the_batch(script, train, plain_run, tmp_path):
    """Micro-batches of one, gradient checkpointing and evaluations change no number."""
    flags = {"eval_every": 1} if script in OFFLINE else {"sample_batch_size": 1}
    run = train(script, tmp_path, micro_batch_size=1, gradient_checkpointing="on", **flags)
    assert_same_run(run, plain_run(script))
    assert common.causal_lm(run.model).is_gradient_checkpointing
    modes = [update.is_training for update in run.updates]
    assert all(modes), f"evaluation mode in a step: checkpointing would be off: {modes}"


@OF_SCRIPTS
def test_two_processes_equal_one(script, train, plain_run, tmp_path):
    """Although one process gets more of a batch, and may get all of the last one."""
    assert_same_run(train(script, tmp_path, processes=2, micro_batch_size=2), plain_run(script))


@OF_SCRIPTS
def test_evaluations_a_loss_scale_and_an_interruption_change_nothing(
        script, train, plain_run, tmp_path):
    """A power of two as the loss scale is exact if clipping and logging come after unscaling.

    Here it doubles with every update, so that a scale that is not restored would show.
    """
    flags = {"save_every": 1, "double": False} | ({"eval_every": 1} if script in OFFLINE else {})
    replace = {"common.grad_scaler": lambda model: torch.amp.GradScaler(
        "cpu", init_scale=2.0**8, growth_interval=1)}
    log_step = script.log_step

    def killed(args, state, metrics, *rest):
        if metrics["step"] == 3:
            raise KeyboardInterrupt
        log_step(args, state, metrics, *rest)

    with pytest.raises(KeyboardInterrupt):
        train(script, tmp_path, replace=replace | {"log_step": killed}, **flags)
    run = train(script, tmp_path, replace=replace, **flags)
    plain = plain_run(script, double=False)
    assert_same_run(run, plain, rel=1e-5)
    per_step = len(plain.updates) // 3
    scales = [line["loss_scale"] for line in run.metrics]
    assert scales == [2.0 ** (8 + per_step * step) for step in (1, 2, 3)]
    assert len(run.updates) == per_step, "steps after the interruption: only the third"
    if script in OFFLINE:
        held = {name.removeprefix("eval_"): x for name, x in run.metrics[-1].items()
                if name.startswith("eval_")}
        close(run.summary["after"], held, "the last evaluation is what `after` says", 1e-12)


@OF_SCRIPTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_run_in_16_bits_is_near_one_in_32(script, dtype, train, plain_run, tmp_path):
    """The base is in 16 bits, trained and saved weights in 32. Everything is under autocast."""
    if dtype == torch.bfloat16 and script is not sft:
        pytest.skip("fp16 is harder than bf16 and covers it")
    # Online, one step decides what the next one clips, which magnifies differences.
    flags = {"double": False} | ({"learning_rate": 1e-5} if script in ONLINE else {})
    plain = plain_run(script, **flags)
    load_model, uncast = common.load_model, []

    def load_and_watch(*args, **kwargs):
        model = load_model(*args, **kwargs)
        common.causal_lm(model).base_model.register_forward_pre_hook(
            lambda *_: None if torch.is_autocast_enabled("cpu") else uncast.append(1))
        return model

    scale = 2.0**8 if dtype == torch.float16 else 1.0
    run = train(script, tmp_path, **flags, replace={
        "common.choose_dtype": lambda device: dtype, "common.load_model": load_and_watch,
        "common.autocast": lambda model: torch.autocast("cpu", dtype),
        "common.grad_scaler": lambda model: torch.amp.GradScaler(
            "cpu", init_scale=scale, enabled=dtype == torch.float16)})
    assert not uncast, f"{len(uncast)} forward passes were outside common.autocast"
    for ours, expected in zip(run.metrics[:2], plain.metrics, strict=False):
        for name, allowed in ("loss", 0.03), ("entropy", 0.03), ("grad_norm", 0.08):
            if name in expected:
                close(ours[name], expected[name], f"step {ours['step']}, {name}", allowed, 0.003)
        assert ours["loss_scale"] == scale
    assert run.metrics[1]["grad_norm"] != plain.metrics[1]["grad_norm"], "it was not in 16 bits"
    assert {w.dtype for w in run.updates[-1].weights} == {torch.float32}, "trained weights"
    assert {w.dtype for w in run.saved.values()} == {torch.float32}, "saved weights"


# ---- one optimizer step --------------------------------------------------------------------------

@pytest.mark.parametrize("steps", [1, 9, 10, 30, 500])
def test_the_learning_rate_rises_linearly_for_a_tenth_and_falls_along_a_cosine(steps):
    """It comes close to its peak after a tenth of the steps, and is never 0."""
    rates = [sft.learning_rate(step, steps, 1.0) for step in range(1, steps + 1)]
    warm = round(0.1 * steps)
    for step, rate in enumerate(rates, 1):
        cosine = (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        close(rate, min(step / (warm + 1), cosine), f"learning rate of step {step} of {steps}")
    assert rates.index(max(rates)) in (warm - 1, warm) and 0.95 < max(rates) and min(rates) > 0


def test_an_overflow_skips_its_step_and_halves_the_scale(train, tmp_path):
    """The step moves no weight, and the scale is halved until fp32 has room."""
    sft_loss = sft.sft_loss
    run = train(sft, tmp_path, double=False, max_steps=12, epochs=6, replace={
        "sft_loss": lambda *args: 1000 * sft_loss(*args),
        "common.grad_scaler": lambda model: torch.amp.GradScaler("cpu", init_scale=2.0**120)})
    skipped = [line["grad_norm"] is None for line in run.metrics]
    assert skipped[0] and not all(skipped), skipped
    before, scale = run.start[1], 2.0**120
    for line, update, is_skipped in zip(run.metrics, run.updates, skipped, strict=True):
        scale = scale / 2 if is_skipped else scale
        assert line["loss_scale"] == scale, f"loss scale of step {line['step']}"
        same = [torch.equal(a, b) for a, b in zip(update.weights, before, strict=True)]
        assert all(same) == is_skipped, f"weights in step {line['step']}"
        before = update.weights


def test_without_a_scale_to_lower_an_infinite_gradient_is_an_error(train, tmp_path, refused):
    """In fp32 the run ends with a line that names --learning-rate."""
    replace = {"sft_loss": lambda logps, *rest: math.inf * logps.sum()}
    assert "--learning-rate" in refused(train, sft, tmp_path, double=False, replace=replace)


# ---- only gradients move weights, and the trained weights are saved ------------------------------

@OF_SCRIPTS
def test_at_learning_rate_0_nothing_moves(script, train, tmp_path):
    """The evaluation after the run equals the one before it, samples included."""
    run = train(script, tmp_path, fixed=False, max_steps=1,
                replace={"learning_rate": lambda *args: 0.0})
    after = run.updates[-1].weights
    assert all(torch.equal(a, b) for a, b in zip(after, run.start[1], strict=True))
    assert run.summary["before"] == run.summary["after"]
    for sample in run.summary["samples"]:
        assert sample.get("before") == sample.get("after"), "samples have another seed or prompt"


def assert_saved(run):
    """The file has the weights of the trained adapter, and of a reward model's head."""
    named = dict(run.model.named_parameters())
    for name, weight in run.saved.items():
        full = name.replace(".weight", ".default.weight")
        if "score" in name:
            full = name.replace("score", "score.modules_to_save.default")
        assert torch.equal(weight, named[full]), name
    trained = [name for name in named if "lora_" in name and ".default." in name]
    assert len([name for name in run.saved if "lora_" in name]) == len(trained)


@OF_SCRIPTS
def test_one_adapter_is_saved_and_it_is_the_trained_one(script, plain_run):
    """The base, reference, reward model, critic and state of the run are not saved."""
    run = plain_run(script)
    files = sorted(str(path.relative_to(run.folder)) for path in run.folder.rglob("*")
                   if path.suffix in (".safetensors", ".pt", ".bin"))
    assert files == ["adapter_model.safetensors"]
    assert_saved(run)
    assert all("lora_" in name or script in (reward_model, prm) for name in run.saved)


def test_peft_alone_loads_what_a_run_saved(plain_run, monkeypatch):
    """The adapter on its base gives the held-out loss that the summary reports."""
    run = plain_run(sft, double=False)
    monkeypatch.chdir(common.HERE)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(run.folder, dtype=torch.float32)
    tokenizer = common.load_tokenizer(str(run.folder))
    total, count = 0.0, 0
    for row in rows_of(sft, 4, first=20):
        example, = sft.encode_conversation(row, tokenizer, 512)
        ids, mask = example["tokens"]["input_ids"], torch.tensor(example["tokens"]["loss_mask"])
        with torch.no_grad():
            total -= (logps(model, ids[:1], ids[1:]) * mask[1:]).sum().item()
        count += mask.sum().item()
    close(run.summary["after"]["loss"], total / count, "held-out loss", 1e-5)


def test_training_all_weights_saves_a_plain_model(train, tmp_path):
    """With --lora-rank 0. The head is tied to the embeddings and trained with them."""
    run = train(sft, tmp_path, double=False, lora_rank=0, learning_rate=1e-3)
    assert not list(run.folder.glob("adapter*"))
    saved = dict(transformers.AutoModelForCausalLM.from_pretrained(run.folder).named_parameters())
    for name, weight in run.model.named_parameters():
        assert torch.equal(weight, saved[name]), name
    assert not any(torch.equal(a, b)
                   for a, b in zip(run.updates[-1].weights, run.start[1], strict=True))


@pytest.mark.parametrize("script", [sft, reward_model, dpo], ids=lambda x: x.__name__)
def test_a_run_continues_from_the_adapter_of_another(script, train, plain_run, tmp_path, capsys):
    """Its figures `before` are those of the other `after`; both are printed in columns."""
    first = plain_run(script, double=False)
    again = train(script, tmp_path, double=False, model=first.folder, max_steps=1)
    before, after = again.summary["before"], again.summary["after"]
    # dpo.py measures rewards relative to its reference, which is now the result of the other run.
    same = ["chosen_logp", "rejected_logp"] if script is dpo else ["loss"]
    close(before, {name: first.summary["after"][name] for name in same}, "before", 1e-4)
    assert_saved(again)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name, value in after.items():
        assert [name, f"{before[name]:.3f}", f"{value:.3f}"] in lines, f"{name} in the table"
    assert before != after


# ---- the order of the data -----------------------------------------------------------------------

def numbers_in(prompts):
    """The numbers of the rows from `rows_of` that these ids encode."""
    texts = tokenizer().batch_decode([ids["input_ids"] if "input_ids" in ids else ids
                                      for ids in prompts])
    return {int(re.search(r"Add (\d+)", text)[1]) for text in texts}


@pytest.mark.parametrize("script", [sft, reward_model, prm, dpo, *ONLINE], ids=lambda x: x.__name__)
def test_an_epoch_is_all_rows_once_and_no_held_out_prompt(script, train, tmp_path):
    """Each epoch has an order of its own, given by the seed. (kto.py plans by label.)"""
    flags = {"epochs": 2, "max_steps": 99} if script in OFFLINE else {
        "max_steps": 16, "max_new_tokens": 2}
    flags |= {"epochs": 1, "minibatches": 1} if script is ppo else {}
    flags |= {"max_rounds": 1} if script is grpo else {}
    watched = "collate" if script in OFFLINE else "join_answers"
    orders = []
    for seed in 0, 1:
        run = train(script, tmp_path / str(seed), rows=10, watch=[watched], seed=seed, eval_size=2,
                    batch_size=1, double=False, **flags)
        calls = run.calls[watched]
        trained = [x.is_training for x in calls]
        if script in ONLINE:  # a rollout before and one after the run are held out
            trained = [0 < i < len(calls) - 1 for i in range(len(calls))]
        order, held_out = [], set()
        for call, is_training in zip(calls, trained, strict=True):
            numbers = numbers_in(call.args[0])
            if is_training:
                order += numbers
            else:
                held_out |= numbers
        assert len(order) == 16 and len(held_out) == 2, (order, held_out)
        assert sorted(order[:8]) == sorted(order[8:]) == sorted(set(range(10)) - held_out)
        orders += [order[:8], order[8:]]
    assert len(set(map(tuple, orders))) == 4, f"orders of two epochs and two seeds: {orders}"


def test_rounds_of_dapo_read_other_prompts_with_other_seeds(monkeypatch):
    """Step, round and process determine both. The processes share the batch of a round."""
    args, order = SimpleNamespace(seed=5, max_steps=4, batch_size=3), torch.randperm(24)
    monkeypatch.setattr(common, "WORLD", 2)
    read, seeds = [], []
    for number, step, rank in itertools.product(range(2), range(1, 5), range(2)):
        monkeypatch.setattr(common, "RANK", rank)
        mine, seed = grpo.pick_prompts(range(100, 124), order, step, number, args)
        assert len(mine) == (2, 1)[rank]
        read += mine
        seeds.append(seed)
    assert sorted(read) == list(range(100, 124)), "a prompt is read twice before all have been read"
    assert len(set(seeds)) == 16 and min(seeds) >= 10**6, "a seed for each round and process"
