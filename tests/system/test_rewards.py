"""Rewards that users bring: their scores are used as they are meant, or refused in one line."""
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, flags_of, run_args

import common
import evaluate
import grpo
import online_dpo
import pairs
import ppo

pytestmark = pytest.mark.filterwarnings("ignore")
ONLINE = {"grpo": grpo, "ppo": ppo, "online_dpo": online_dpo}
ROWS = [{"prompt": [{"role": "user", "content": f"What is {a} + 1?"}], "answer": str(a + 1)}
        for a in range(1, 7)]
HELD_OUT = [{"prompt": [{"role": "user", "content": "What is 9 + 1?"}], "answer": "10"}]


@pytest.fixture
def run(tmp_path, write_jsonl, monkeypatch):
    """Runs one step of a script that samples, or pairs.py or evaluate.py on a few prompts."""
    monkeypatch.chdir(ROOT)

    def start(name, reward, rows=ROWS, **flags):
        file = write_jsonl(rows)
        if name in ONLINE:
            flags = dict(dataset=file, eval_dataset=write_jsonl(HELD_OUT, "held_out.jsonl"),
                         batch_size=4, max_steps=1, max_new_tokens=4, reward=reward,
                         output_dir=tmp_path / name) | flags
            return ONLINE[name].train(run_args(ONLINE[name], **flags))
        module = {"pairs": pairs, "evaluate": evaluate}[name]
        argv = ["tiny/chat", "--dataset", file, "--reward", str(reward), "--max-new-tokens", "12"]
        argv += ["--output", str(tmp_path / "made.jsonl")]
        for flag, value in flags.items():
            argv += ["--" + flag.replace("_", "-"), str(value)]
        return module.main(flags_of(module).parse_args(argv))
    return start


MINE = """import functools, json
def abstains(completions, **columns): return [None] * len(completions)
def some(answer, **columns): return [float(x) if int(x) % 2 else None for x in answer]
def large(completions, **columns): return [1e37] * len(completions)
def fails(completions, **columns):
    return [json.loads('{') for text in completions] # mine
async def waits(**columns): return [1.0]
async def yields(**columns): yield 1.0
class Waits:
    async def __call__(self, **columns): return [1.0]
called = Waits()
partial = functools.partial(waits, x=1.0)
"""


@pytest.fixture
def mine(tmp_path):
    """A file with reward functions of a user."""
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


# ---- functions -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name, reward, flags, words", [
    *((name, "abstains", {}, "(?=.*mine.py:abstains).*return(s|ed) None")
      for name in ("ppo", "online_dpo", "pairs")),
    ("evaluate", "some", {"best_of": 2}, "must not return None"),
    ("grpo", "large", {"reward_weights": [1e9]}, "weighted sum of rewards is too large")])
def test_scores_that_cannot_be_used_are_refused(name, reward, flags, words, run, refused, mine):
    """The only reward must apply to every answer, and a sum must be finite."""
    line = refused(run, name, f"{mine}:{reward}", **flags)
    assert re.search(words, line), line


@pytest.mark.parametrize("score", [1e39, -1e39, float("nan"), float("inf")])
def test_a_score_that_fp32_turns_into_infinity_is_refused(score, refused):
    """1e39 is finite in Python but infinite in fp32, and would make advantages NaN."""
    examples = [{"row": {"prompt": "x"}}] * 2
    line = refused(grpo.call_reward, "mine", lambda **columns: [score, 0.0], examples, ["a", "b"])
    assert f"expected 2 numbers below 1e38 (or None), got [{score}, 0.0]" in line


def test_the_mean_reward_leaves_out_answers_without_one(run, mine, tmp_path):
    for reward, mean in ("some", (3 + 5 + 7) / 3), ("abstains", None):
        run("evaluate", f"{mine}:{reward}", output=tmp_path / f"{reward}.json")
        line, = json.loads((tmp_path / f"{reward}.json").read_text())
        assert line["reward"] == (mean and pytest.approx(mean))


@pytest.mark.parametrize("name", [*ONLINE, "pairs", "evaluate"])
def test_an_error_shows_the_line_of_the_users_file(name, run, mine, refused):
    """Even if a library that the function calls raises it."""
    line = refused(run, name, f"{mine}:fails")
    assert f"{mine}:6: return [json.loads('{{') for text in completions] # mine: " in line
    assert "(completions are strings)" in line
    assert line.endswith("JSONDecodeError: Expecting property name enclosed in double quotes: "
                         "line 1 column 2 (char 1)")


@pytest.mark.parametrize("name", ["waits", "yields", "called", "partial"])
def test_an_async_function_is_refused_when_it_is_loaded(name, mine, refused):
    line = refused(common.load_function, f"{mine}:{name}")
    assert "plain function, not async" in line and f"mine.py:{name}" in line


def test_a_reward_can_import_files_beside_it(tmp_path, monkeypatch):
    """When it is loaded and when it is called. A file beside it hides no library."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_a_reward.py").write_text("def double(x):\n    return 2.0 * x\n")
    (tmp_path / "peft.py").write_text("raise ImportError\n")
    (tmp_path / "mine.py").write_text(
        "from beside_a_reward import double\ndef f(completions, **columns):\n"
        "    import beside_a_reward, peft\n"
        "    return [beside_a_reward.double(double(len(x))) for x in completions]\n")
    assert common.load_function(f"{tmp_path}/mine.py:f")(completions=["abc"]) == [12.0]


def test_a_column_may_have_any_name():
    """Even those of the arguments of a reward model and of a judge."""
    args = flags_of(pairs).parse_args(["--output", "x.jsonl", "--judge", "tiny/chat",
                                       "--judge-template", f"{ROOT}/examples/judge_tiny.txt"])
    columns = ("model tokenizer args template outcome flips by_steps principles prompts "
               "completions name").split()
    examples = [{"row": ROWS[0] | dict.fromkeys(columns, "x")}] * 2
    texts = ["1 + 1 = 2", "1 + 1 = 3"]
    for scorer in pairs.load_judge(args, []), pairs.load_scorer(str(ROOT / "tiny/reward"), args):
        plain = pairs.call_reward("r", scorer, [{"row": ROWS[0]}] * 2, texts)
        assert pairs.call_reward("r", scorer, examples, texts) == plain


# ---- reward models -------------------------------------------------------------------------------

def test_a_process_reward_model_does_not_score_whole_answers(tmp_path, refused):
    shutil.copytree(ROOT / "tiny/reward", tmp_path / "r")
    summary = tmp_path / "r/summary.json"
    summary.write_text('{"method": "prm"}')
    assert "prm.py saved it" in refused(grpo.check_reward, str(tmp_path / "r"), "tiny/chat")
    for other in "[]", "{}", '{"method": "reward_model"}':
        summary.write_text(other)
        common.reward_config(str(tmp_path / "r"), "tiny/chat")
    summary.unlink()
    common.reward_config(str(tmp_path / "r"), "tiny/chat")


def test_a_reward_model_of_the_hub_is_refused_with_advice(run, refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in "grpo", "pairs":
        line = refused(run, name, "Skywork/Skywork-Reward-V2-Qwen3-0.6B")
        assert "REWARD_MODEL=NAME, --reward examples/rewards.py:classifier" in line


# ---- --output and --k ----------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["pairs", "evaluate"])
def test_an_output_must_be_new_and_writable(name, run, tmp_path, refused, monkeypatch):
    """Otherwise the program ends before it loads anything."""
    monkeypatch.setattr(common, "load_tokenizer", None)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "link.jsonl")
    (tmp_path / "file.jsonl").write_text("mine")
    for output in ("", "x" * 300 + ".jsonl", tmp_path / "none/x.jsonl", tmp_path / "link.jsonl",
                   tmp_path / "file.jsonl", tmp_path / "file.jsonl/x.jsonl", tmp_path,
                   "/proc/x.jsonl"):
        assert "--output" in refused(run, name, "correct_answer", output=output)
    assert (tmp_path / "file.jsonl").read_text() == "mine"


@pytest.mark.parametrize("name", ["pairs", "evaluate"])
def test_a_full_disk_leaves_nothing_and_blocks_nothing(name, run, tmp_path, refused, monkeypatch):
    """Another file beside the output stays as it is."""
    output = tmp_path / "made.jsonl"
    (tmp_path / "made.jsonl.new").write_text("mine")
    write, rows = Path.write_text, [ROWS[0] | {"answer": "2"}] * 4

    def full(self, text, *args):
        if self.name == "rows.jsonl":
            return write(self, text)
        write(self, text[:9])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        line = refused(run, name, "examples/rewards.py:shortness", rows)
    assert "No space left" in line and "same command" not in line and str(output) in line
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"rows.jsonl", "made.jsonl.new"}
    run(name, "examples/rewards.py:shortness", rows)
    assert output.exists()
    assert (tmp_path / "made.jsonl.new").read_text() == "mine"


@pytest.mark.parametrize("samples, k", [(1, 1), (2, 2), (5, 4)])
def test_k_is_at_most_the_number_of_samples(samples, k, run, refused, capsys):
    run("evaluate", "correct_answer", ROWS[:2], samples_per_prompt=samples)
    assert f"pass@{k} " in capsys.readouterr().out
    assert "--k" in refused(run, "evaluate", "correct_answer", samples_per_prompt=samples, k=6)
