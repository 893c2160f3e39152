"""agent.py: the mask, the ids that the environment writes, a run by hand.

Losses, advantages and sampling are those of grpo.py; calls and tools are in test_tools.py.
"""
import functools
import json
import random
import statistics
from types import SimpleNamespace

import by_hand
import pytest
import torch
import transformers
from conftest import run_args
from runs_helper import interrupted
from test_grpo import plain_advantages, plain_loss
from test_templates import FAMILIES, tokenizer_of

import agent
import common

CALCULATOR, SCHEMAS = agent.load_tools(["examples/tools.py:calculator"])
QUESTION = by_hand.ask("What is 123 * 456?")
END = "<|im_end|>"
CPU = torch.device("cpu")


def call(expression, name="calculator"):
    arguments = json.dumps({"expression": expression})
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@functools.cache
def tiny_tokenizer():
    return common.load_tokenizer("tiny/agent")


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ---- the mask, and ids that are appended ---------------------------------------------------------

HERMES = ["tiny/agent", "qwen2.5", "qwen3", "examples/tools.jinja",
          "tokenizers/Qwen2.5-0.5B-Instruct"]


def template_of(name, request):
    if name == "tiny/agent":
        return tiny_tokenizer()
    elif name == "examples/tools.jinja":
        tokenizer = common.load_tokenizer("tiny/chat", name)
    elif name in FAMILIES:
        tokenizer = tokenizer_of(name)
    else:
        folder = request.getfixturevalue("shared") / name
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 10**6
    return tokenizer


def play(tokenizer, said):
    """A conversation in which the policy samples the ids `said`, a list per turn."""
    args = SimpleNamespace(sample_batch_size=8, max_turns=9, max_length=9999, max_new_tokens=99,
                           tool_seconds=5.0)
    own = SimpleNamespace(eos_token_id=tokenizer.eos_token_id)
    model, turns = SimpleNamespace(device=CPU, generation_config=own), iter(said)
    prompt = common.encode_prompt(tokenizer, QUESTION, SCHEMAS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent, "sample", lambda *_: [next(turns)])
        talk, = agent.converse(model, [{"prompt": prompt}], 1, tokenizer, CALCULATOR, args, 0)
    batch = agent.join_conversations([talk, talk | {"ids": [1], "mask": [1]}], tokenizer, model)
    return SimpleNamespace(talk=talk, prompt=prompt, batch=batch)


def whole(tokenizer, *messages):
    """The whole conversation, rendered from its messages at once."""
    chat = [*QUESTION, *messages]
    return tokenizer.apply_chat_template(chat, tools=SCHEMAS, tokenize=False)


def says(*expressions, content="", **thought):
    calls = [{"function": {"name": "calculator", "arguments": {"expression": x}}}
             for x in expressions]
    return {"role": "assistant", "content": content, **thought} | (
        {"tool_calls": calls} if calls else {})


def reads(result):
    return {"role": "tool", "name": "calculator", "content": result}


@pytest.mark.parametrize("name", HERMES)
def test_only_sampled_tokens_are_trained_and_the_ids_are_those_of_a_whole_rendering(name, request):
    """Three turns, with one call, two calls and none, in one conversation."""
    tokenizer = template_of(name, request)
    think, thought = "", {}
    if name == "qwen3":
        think, thought = "<think>\nhm\n</think>\n\n", {"reasoning_content": "hm"}
    between = "" if name == "tiny/agent" else "\n"
    turns = [call("1 / 0"), call("2") + between + call("3"), "It is 56088."]
    said = [ids_of(tokenizer, think + text + tokenizer.eos_token) for text in turns]
    played = play(tokenizer, said)
    ids, mask = played.batch["input_ids"][0], played.batch["loss_mask"][0]
    assert ids[mask > 0].tolist() == sum(said, []), "the mask must be 1 on what was sampled"
    assert mask[:len(played.prompt)].sum() == 0, "the prompt is trained"
    assert played.batch["loss_mask"][1].tolist() == [1] + [0] * (len(mask) - 1), "padding"
    text = whole(
        tokenizer, says("1 / 0", **thought), reads("error: ZeroDivisionError: Fraction(1, 0)"),
        says("2", "3", **thought), reads("2"), reads("3"), says(content="It is 56088.", **thought))
    assert [*ids.tolist(), *ids_of(tokenizer, "\n")] == ids_of(tokenizer, text)
    written = len(ids) - len(played.prompt) - len(sum(said, []))
    expected = {"calls": 3, "failed_calls": 1, "turns": 3, "environment_tokens": written}
    assert {name: played.batch[name][0].item() for name in agent.COUNTS} == expected
    assert played.batch["stopped"][0] and played.talk["text"] == think + "It is 56088."


# ---- the gradient --------------------------------------------------------------------------------

def test_the_gradient_of_the_worked_example_is_0_on_what_the_environment_wrote(monkeypatch):
    """On a sampled token it is −A / (|o| B) at ratio 1, where |o| counts sampled tokens only."""
    tokenizer = tiny_tokenizer()
    said = [ids_of(tokenizer, x + END) for x in (call("123 * 456"), "56088")]
    played = play(tokenizer, said)
    batch = {name: x[[0, 0, 1, 1]] for name, x in played.batch.items()}
    mask = batch["loss_mask"][:, 1:]
    logps = torch.randn(mask.shape, dtype=torch.float64).requires_grad_()
    advantages = agent.group_advantages(torch.tensor([[1.0, 0, 0, 1]]).double())[0]
    batch |= {"advantages": advantages, "kept": torch.ones(4), "ref_logps": torch.zeros(mask.shape)}
    monkeypatch.setattr(agent, "token_logps", lambda model, batch, temperature: logps)
    args = run_args(agent, beta=0, batch_size=1, group_size=4)
    agent.conversation_gradients(SimpleNamespace(device=CPU), batch,
                                 SimpleNamespace(scale=lambda loss: loss), args)
    assert (logps.grad[mask == 0] == 0).all(), "the environment is trained"
    prompt, first, last = len(played.prompt), *map(len, said)
    written, gradients = batch["environment_tokens"][0], logps.grad[0][mask[0] > 0]
    expected = -advantages[0].expand(first + last) / (4 * (first + last))
    by_hand.same(gradients, expected, "gradient of a sampled token", 1e-8)
    by_hand.documented(
        agent, ("mask tokens 0 {:.0f} <", prompt), ("1 {:.0f} <", first), ("0 {:.0f} <", written),
        ("1 {:.0f} 56088", last), ("advantage is {:.3f}", advantages[0]),
        ("= {:.0f}. At ratio 1", first + last), ("= {:.5f} for each", gradients[0]),
        ("make up {:.0%} of", written / (first + last + written)))


# ---- a run, recomputed by hand -------------------------------------------------------------------

CASES = {"grpo": ("group", 0.1, 0.15), "dr_grpo": ("group", 0.15, 0.1), "dapo": ("rloo", 0.1, 0.15)}
ROWS = [{"prompt": by_hand.ask(f"What is {a} * {b}?"), "answer": str(a * b)}
        for a, b in [(123, 4), (7, 567), (31, 31), (8, 99)]]
REWARD = '''
def varied(prompts, completions, answer, **columns):  # the prompt with answer 961: all equal
    return [1 if x == "961" else sum(map(ord, y)) % 8 for x, y in zip(answer, completions)]
'''
TOOL = '''
def add(n: int):
    """Adds 1.

    Args:
        n: The number.
    """
    return n + 1
'''
BROKEN = "error: JSONDecodeError: Expecting ':' delimiter: line 1 column 8 (char 7)"
FLAGS = dict(beta=0.3, batch_size=3, group_size=3, updates=2, temperature=1.5,
             max_turns=3, max_new_tokens=40, max_length=170, lora_rank=4, save_every=1)


def scripted_turn(prompt, number):
    """A made-up turn: its ids, the results of its calls (None if it is truncated), its answer."""
    draw = random.Random(f"71 {prompt} {number}")
    n = f"{draw.randrange(1000)} "
    result = str(int(n) + 1)
    add = f'<tool_call>{{"name": "add", "arguments": {{"n": {n}}}}}</tool_call>'
    text, results, answer = draw.choice([
        (add, [result], ""), (n + add, [result], n), (f"{add} {add}", [result] * 2, " "),
        (n + '<tool_call>{"name"}</tool_call>', [BROKEN], n), (n + "figs", [], n + "figs"),
        (n + add, None, n)])
    return tiny_tokenizer()(text + END * (results is not None)).input_ids, results, answer


def scripted_sample(model, tokenizer, prompts, *rest):
    return [scripted_turn(prompt, prompts[:place].count(prompt))[0]
            for place, prompt in enumerate(prompts)]


def talk_by_hand(prompt, number):
    """A whole conversation, with its mask, its figures and its score."""
    talk = SimpleNamespace(ids=list(prompt), mask=[0] * len(prompt), turns=0, calls=0,
                           failed_calls=0, environment_tokens=0)
    while True:
        said, results, answer = scripted_turn(talk.ids, 0 if talk.turns else number)
        talk.ids, talk.mask = talk.ids + said, talk.mask + [1] * len(said)
        talk.turns, talk.stopped = talk.turns + 1, results == []
        talk.reward, talk.length = sum(map(ord, answer)) % 8, sum(talk.mask)
        if not results or talk.turns == 3:
            return talk
        talk.calls, talk.failed_calls = talk.calls + len(results), talk.failed_calls + (
            results == [BROKEN])
        text = "".join(f"<|im_start|>tool\n{result}{END}\n" for result in results)
        ids = tiny_tokenizer()(f"\n{text}<|im_start|>assistant\n").input_ids
        if len(talk.ids) + len(ids) + 40 > 170:  # no room for another turn
            return talk
        talk.ids, talk.mask = talk.ids + ids, talk.mask + [0] * len(ids)
        talk.environment_tokens += len(ids)


def run_agent(folder, loss, tool=TOOL, replace=None, **flags):
    folder.mkdir(exist_ok=True)
    (folder / "reward.py").write_text(REWARD)
    (folder / "tool.py").write_text(tool)
    flags |= dict(zip(("baseline", "epsilon", "epsilon_high"), CASES[loss], strict=True))
    return by_hand.Run(
        agent, folder, ROWS[:3], ROWS[3:], watch=["rollout"], loss=loss,
        tools=f"{folder / 'tool.py'}:add",
        reward=f"{folder / 'reward.py'}:varied",
        replace={"sample": scripted_sample} | (replace or {}), max_steps=1 + (loss == "grpo"),
        **FLAGS, **flags)


def run_by_hand(run, loss):
    """The same rollouts with two updates each, computed from the equations."""
    hand, limits, seen = by_hand.Training(run), CASES[loss][1:], set()
    for called in run.calls["rollout"][1:-1]:
        talks = []
        for example in called.args[2]:
            for number in range(3):
                talks.append(talk_by_hand(example["prompt"], number))
                if example["row"]["answer"] == "961":
                    talks[-1].reward = 1
        assert [talk.ids for talk in talks] == [talk["ids"] for talk in called.result[1]]
        groups = [[talk.reward for talk in talks[i:i + 3]] for i in (0, 3, 6)]
        advantages = sum([plain_advantages(group, loss, CASES[loss][0]) for group in groups], [])
        kept = [loss != "dapo" or (talk.stopped and len(set(groups[i // 3])) > 1)
                for i, talk in enumerate(talks)]
        seen |= {(talk.turns, talk.stopped) for talk in talks}

        def read(model, talks=talks):
            return [by_hand.logps(model, talk.ids[:1], talk.ids[1:], 1.5)[
                torch.tensor(talk.mask[1:]) > 0] for talk in talks]
        ref, old = read(hand.reference), [x.detach() for x in read(hand.model)]
        logged = {name: statistics.fmean(getattr(talk, name) for talk in talks)
                  for name in ("reward", "length", "stopped", *agent.COUNTS)}
        logged |= {"loss": 0, "kl": ((torch.cat(old) - torch.cat(ref)).sum() / 9).item()}
        for _ in range(2):
            new = read(hand.model)
            value, _ = plain_loss(loss, new, old, ref, advantages, kept, 0.3, *limits, 3 * 40)
            logged["loss"] += value.item() / 2
            update = hand.update(value)
        hand.log(update | logged)
    assert {turns for turns, _ in seen} == {1, 2, 3} and len(seen) > 4, seen
    return hand


@pytest.mark.parametrize("loss", CASES)
def test_rollouts_are_those_by_hand(loss, tmp_path, refused):
    """Each logged number and weight; also after an interruption, in parts, in two processes."""
    run = run_agent(tmp_path / "whole", loss, micro_batch_size=9)
    with by_hand.doubles():
        hand = run_by_hand(run, loss)
    hand.check(run)
    again, flags = tmp_path / "again", {"micro_batch_size": 2}
    if loss == "grpo":
        with pytest.raises(InterruptedError):
            run_agent(again, loss, replace={"log_step": interrupted(agent.log_step)}, **flags)
        line = refused(run_agent, again, loss, TOOL + "# another version of the tool", **flags)
        assert "name another folder" in line, "the results of another tool would differ"
    second = run_agent(again, loss, processes=1 + (loss == "dapo"), **flags)
    assert len(second.updates) == 2, "it must continue after step 1"
    hand.check(second)
    by_hand.close(second.summary["before"], run.summary["before"], "held out, before")
