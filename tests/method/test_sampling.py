"""What `sample` gives is drawn from exactly the distribution that `token_logps` scores.

Both functions are the same in every script that has them; here they are those of grpo.py.
"""
import itertools
import math
import random
from argparse import Namespace
from collections import Counter

import pytest
import tokenizers
import torch
import transformers

import common
import grpo

PROMPTS = [[1, 2, 3], [4, 0, 5], [6, 1, 1, 0, 7, 3, 5], [3]]  # 0 is the pad token as well
NEAR_ZERO = 1e-6  # the temperature at which evaluate.py decodes greedily
WINDOW = 4
SIZES = dict(vocab_size=12, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=64,
             initializer_range=0.4, bos_token_id=None, eos_token_id=None, pad_token_id=None)
CONFIGS = {
    "qwen2": transformers.Qwen2Config(**SIZES),
    "llama": transformers.LlamaConfig(**SIZES),
    "mistral": transformers.MistralConfig(sliding_window=WINDOW, **SIZES),
    "gemma": transformers.GemmaConfig(**SIZES),
    "gemma3": transformers.Gemma3TextConfig(
        sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"], **SIZES),
    "gpt2": transformers.GPT2Config(
        vocab_size=12, n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4,
        bos_token_id=None, eos_token_id=None)}


def make_tokenizer(eos=11, end_of_turn=None):
    """A token for each number below 12; an end of turn makes a chat template that ends in it."""
    model = tokenizers.models.WordLevel({str(i): i for i in range(12)}, unk_token="0")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), eos_token=str(eos), pad_token="0")
    if end_of_turn is not None:
        tokenizer.add_special_tokens({"additional_special_tokens": [str(end_of_turn)]})
        tokenizer.chat_template = (
            "{% for message in messages %}{{ message.content }}" f"{end_of_turn}" "{% endfor %}")
    return tokenizer


def make_model(shape="qwen2", seed=0, **changes):
    """A random model with uneven next-token probabilities, in evaluation mode."""
    torch.manual_seed(seed)
    config = type(CONFIGS[shape])(**CONFIGS[shape].to_dict() | changes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def sample(model, prompts=PROMPTS, copies=1, longest=6, temperature=1.0, seed=0, tokenizer=None):
    args = Namespace(max_new_tokens=longest, temperature=temperature)
    return grpo.sample(model, tokenizer or make_tokenizer(), prompts, copies, args, seed)


@torch.no_grad()
def next_logps(model, rows, temperature=1.0):
    """log softmax(logits / T) after rows of one length: no cache, no mask, no padding."""
    return (model(torch.tensor(rows)).logits[:, -1].double() / temperature).log_softmax(-1)


# ---- the distribution ----------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_samples_follow_the_distribution_that_is_scored(temperature):
    """Answers of up to three tokens come as often as their enumeration says (chi-squared).

    The two prompts differ in length, and answers leave the batch at every step.
    """
    model, count, stops = make_model(vocab_size=6), 10000, (4, 5)
    tokenizer = make_tokenizer(eos=5)
    model.generation_config.eos_token_id = [4]
    prompts = [[1, 2, 3, 0, 2], [3, 1]]
    drawn = sample(model, prompts, count, 3, temperature, tokenizer=tokenizer)
    for number, prompt in enumerate(prompts):
        logps = {(): 0.0}
        for _ in range(3):
            going = [answer for answer in logps if not answer or answer[-1] not in stops]
            nexts = next_logps(model, [prompt + list(answer) for answer in going], temperature)
            for answer, row in zip(going, nexts.tolist(), strict=True):
                before = logps.pop(answer)
                logps |= {answer + (token,): before + logp for token, logp in enumerate(row)}
        expected = {answer: count * math.exp(logp) for answer, logp in logps.items()}
        assert sum(expected.values()) == pytest.approx(count)
        seen = Counter(map(tuple, drawn[number * count:(number + 1) * count]))
        assert seen.keys() <= expected.keys()
        often = [answer for answer in expected if expected[answer] >= 5]
        cells = [(seen[answer], expected[answer]) for answer in often]
        cells.append((count - sum(x for x, _ in cells), count - sum(x for _, x in cells)))
        chi2 = sum((x - mean) ** 2 / mean for x, mean in cells)
        degrees = len(cells) - 1
        assert degrees > 20 and chi2 < degrees + 4 * math.sqrt(2 * degrees), (chi2, degrees)


def with_adapter(name):
    """As training loads a model, with LoRA matrices that matter, which at the start they do not."""
    torch.manual_seed(0)
    model = common.load_model(str(name), lora_rank=4)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("temperature", [0.8, 1.5])
@pytest.mark.parametrize("shape", CONFIGS)
def test_what_is_scored_is_what_was_sampled(shape, temperature, monkeypatch, tmp_path):
    """The sampler's probability of each token, its score, and a plain forward pass are one.

    The same ids, temperature, adapter and positions, beside prompts of other lengths, beyond the
    sliding window, and after other answers left the batch.
    """
    make_model(shape).save_pretrained(tmp_path)
    model, tokenizer, chosen = with_adapter(tmp_path), make_tokenizer(), []

    def spy(probs, number, generator):
        token = multinomial(probs, number, generator=generator)
        chosen.append(probs.gather(1, token)[:, 0].double().log())
        return token

    multinomial = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", spy)
    answers = sample(model, PROMPTS, 4, 9, temperature)
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    sizes = {len(answer) for answer in answers}
    assert len(sizes) > 2 and max(sizes) == 9 > WINDOW
    batch = grpo.join_answers(prompts, answers, tokenizer, model)
    with torch.no_grad():
        scored = grpo.token_logps(model, batch, temperature)
    model.eval()
    logps, rest = [], scored.clone()
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0].double() / temperature
        plain = logits.log_softmax(-1)
        for t, token in enumerate(answer):
            place = len(prompt) - 1 + t
            alive = [i for i in range(len(answers)) if len(answers[i]) > t]
            sampled = chosen[t][alive.index(row)].item()
            assert scored[row, place].item() == pytest.approx(sampled, abs=2e-5)
            assert plain[place, token].item() == pytest.approx(sampled, abs=2e-5)
            logps.append(sampled)
        rest[row, len(prompt) - 1:len(prompt) - 1 + len(answer)] = 0
    assert (rest == 0).all()  # nothing else has a score
    assert max(logps) - min(logps) > 0.5
    with common.reference(model), torch.no_grad():  # the adapter took part
        assert (grpo.token_logps(model, batch, temperature) - scored).abs().max() > 0.1


@pytest.mark.parametrize("shape", ["qwen2", "mistral", "gpt2"])
def test_near_zero_temperature_is_the_argmax_at_every_step(shape):
    """As a loop without cache or batch, and grouped by prompt."""
    model, loop = make_model(shape), []
    for prompt in PROMPTS:
        answer = []
        while len(answer) < 8 and answer[-1:] != [11]:
            answer.append(next_logps(model, [prompt + answer])[0].argmax().item())
        loop.append(answer)
    assert len(set(map(tuple, loop))) > 1
    answers = sample(model, PROMPTS, 3, 8, NEAR_ZERO)
    assert answers == [answer for answer in loop for _ in range(3)]


def test_answers_are_grouped_by_prompt_and_differ_by_seed():
    """The first group is what the first prompt gets alone; copies and seeds differ."""
    model = make_model()
    answers = sample(model, [[1, 2, 3]] * 2, 8)
    assert len(set(map(tuple, answers))) > 8 and answers[:8] != answers[8:]
    assert answers == sample(model, [[1, 2, 3]] * 2, 8)
    assert answers != sample(model, [[1, 2, 3]] * 2, 8, seed=1)


def test_the_models_own_generation_config_changes_nothing():
    """Top-k, top-p, penalties, temperature and lengths of its own are not the sampler's."""
    model = make_model()
    free = sample(model, copies=4)
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, top_k=1, top_p=0.1, min_p=0.5, temperature=0.1, repetition_penalty=3.0,
        no_repeat_ngram_size=1, max_new_tokens=1, min_new_tokens=9, suppress_tokens=[1, 2, 3])
    assert sample(model, copies=4) == free


# ---- how answers end -----------------------------------------------------------------------------

def test_each_stop_token_ends_an_answer_and_belongs_to_it():
    """Eos, the template's end of turn and both that the generation config names; no other."""
    model, tokenizer = make_model(), make_tokenizer(eos=11, end_of_turn=10)
    model.generation_config.eos_token_id = [8, 9]
    answers = sample(model, copies=64, longest=5, tokenizer=tokenizer)
    stops = {8, 9, 10, 11}
    for answer in answers:
        assert 1 <= len(answer) <= 5 and not stops & set(answer[:-1])
        assert answer[-1] in stops or len(answer) == 5
    assert {answer[-1] for answer in answers if len(answer) < 5} == stops
    assert {len(answer) for answer in answers} == {1, 2, 3, 4, 5}


def test_a_generation_config_may_name_one_stop_token():
    """As a number instead of a list."""
    model = make_model()
    model.generation_config.eos_token_id = 9
    answers = sample(model, copies=32)
    assert {answer[-1] for answer in answers if len(answer) < 6} == {9, 11}


@pytest.mark.parametrize("last, stopped", [(11, True), (10, True), (9, True), (5, False)])
def test_an_answer_of_the_longest_length_that_ends_in_a_stop_token_counts_as_stopped(last, stopped):
    """What tells is its last token, not its length; the mask covers that token and no padding."""
    model, tokenizer = make_model(), make_tokenizer(eos=11, end_of_turn=10)
    model.generation_config.eos_token_id = [9]
    batch = grpo.join_answers([[1, 2], [0, 3, 4]], [[5, 6, last], [11]], tokenizer, model)
    assert batch["stopped"].tolist() == [stopped, True]
    assert batch["input_ids"].tolist() == [[1, 2, 5, 6, last], [0, 3, 4, 11, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch["loss_mask"].tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 1, 0]]


# ---- what it costs, and what it leaves behind ----------------------------------------------------

def test_prompts_are_read_once_and_answers_that_ended_leave_the_batch():
    """Each pass reads one token of each answer that goes on; nothing is read after the last."""
    model, shapes = make_model(), []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True)
    for longest in (12, 5):
        shapes.clear()
        lengths = [len(answer) for answer in sample(model, PROMPTS, 4, longest)]
        going = [sum(length > t for length in lengths) for t in range(1, longest)]
        assert len(set(going)) > 2
        assert shapes == [(4, 7)] + [(number, 1) for number in going if number]
    hook.remove()


@pytest.mark.parametrize("training", [True, False])
def test_a_sample_leaves_everything_as_it_was(training):
    """Mode, adapters, requires_grad, random numbers, cache flags.

    In train mode with gradient checkpointing, generate() would drop the cache: here it is used.
    """
    model = with_adapter("tiny/chat")
    model.add_adapter("reward", model.peft_config["default"])
    tokenizer, prompts, widths = common.load_tokenizer("tiny/chat"), [[5, 9, 17, 33], [80, 12]], []
    model.eval()
    plain = sample(model, prompts, 2, tokenizer=tokenizer)
    with model.disable_adapter():
        assert plain != sample(model, prompts, 2, tokenizer=tokenizer)  # the adapter takes part
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train(training)
    causal = common.causal_lm(model)

    def state():
        modes = [(module.training, getattr(module, "gradient_checkpointing", None))
                 for module in model.modules()]
        grads = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
        return (modes, grads, model.active_adapter, causal.config.to_dict(),
                causal.generation_config.to_dict(), random.getstate(),
                torch.get_rng_state().tolist(), torch.is_grad_enabled())

    before, weights = state(), [p.clone() for p in model.parameters()]
    hook = causal.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    assert sample(model, prompts, 2, tokenizer=tokenizer) == plain
    hook.remove()
    assert state() == before and widths == [4, 1, 1, 1, 1, 1]
    for old, new in itertools.zip_longest(weights, model.parameters()):
        assert torch.equal(old, new)
