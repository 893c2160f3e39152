"""exercise.py: what it grades, what it says, and what it never does.

Every original passes, every stub and every mistake is rejected, and the solved script is not read.
"""
import os
import runpy
import subprocess
import sys
import tomllib

import grading
import pytest
import questions
from conftest import ROOT
from grading import CATALOGUE, SCRIPTS, behaves_like, grade, mistake_of, script_of, source_of

import exercise

each_exercise = pytest.mark.parametrize("name", CATALOGUE)
FILE = "exercises/student.py"


def complaints(name, source):
    return [said for _, said, _ in grade(name, source, FILE) if said]


def written(name, code):
    """The script with code in place of what an exercise blanks first, and its other blanks kept."""
    source = source_of(script_of(name))
    piece = exercise.pieces_of(name)[0]
    indent = piece[:len(piece) - len(piece.lstrip())]
    lines = [indent + line for line in code.splitlines()]
    return source.replace(f"\n{piece}\n", "\n" + "\n".join(lines) + "\n")


@pytest.fixture
def use(monkeypatch, tmp_path, capsys):
    """Runs exercise.py with a folder of its own, and returns what it printed."""
    monkeypatch.setattr(exercise, "FOLDER", tmp_path / "exercises")

    def run(*words, fails=False):
        args = exercise.make_flags().parse_args(words)
        if fails:
            pytest.raises(SystemExit, exercise.main, args)
        else:
            exercise.main(args)
        return "".join(capsys.readouterr())
    return run


# ---- what is graded ------------------------------------------------------------------------------

@each_exercise
def test_the_original_passes_and_the_stub_does_not(name):
    source = exercise.runnable(source_of(script_of(name)), "")
    graded = grade(name, source, FILE)
    assert len(graded) >= 3 and not [line for line in graded if line[1]]
    stub = exercise.blanked(source, name)
    assert stub.count("raise NotImplementedError") == len(exercise.pieces_of(name))
    assert not any(text in stub for text in CATALOGUE[name].get("hide", []))
    assert complaints(name, stub)[0].startswith("nothing is written yet in line")
    entry = CATALOGUE[name]
    assert len(entry["hints"]) == 3 and entry["difficulty"] in ("easy", "medium", "hard")


@each_exercise
def test_each_mistake_is_rejected_by_its_name(name):
    for what in CATALOGUE[name]["mistakes"]:
        graded = grade(name, mistake_of(script_of(name), what)[0], FILE)
        assert any(said for _, said, _ in graded), what
        assert behaves_like(name, graded) == [what]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_mistakes_in_what_is_blanked_are_known(script):
    """Except those that need a run or several processes to be seen."""
    names = [name for name in CATALOGUE if script_of(name) == script]
    blank = "".join(piece for name in names for piece in exercise.pieces_of(name))
    table = tomllib.loads((ROOT / f"tests/mutants/{script}.toml").read_text())["mistake"]
    inside = {entry["what"] for entry in table if entry["old"].strip() in blank}
    known = {what for name in names for what in CATALOGUE[name]["mistakes"]}
    unseen = {"ORPO takes sums instead of means", "z is a mean over the share of a process",
              "columns are left out that one row needs"}
    assert inside - known <= unseen


RIGHT = {
    "sft.with_mask": """
ids = [token for part, _ in pieces for token in part]
mask = [1 if is_answer else 0 for part, is_answer in pieces for _ in part]
return dict(input_ids=ids, loss_mask=mask, attention_mask=[1 for _ in ids])""",
    "sft.token_logps": """
logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
logps = (logits[:, :-1].float() / temperature).log_softmax(-1)
return logps.gather(2, batch["input_ids"][:, 1:, None])[:, :, 0] * batch["loss_mask"][:, 1:]""",
    "sft.sft_loss": "return -logps[loss_mask[:, 1:].bool()].sum() / trained_tokens",
    "reward_model.sequence_rewards": """
hidden = common.causal_lm(model).model(
    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
last = batch["attention_mask"].sum(1, keepdim=True)[:, :, None] - 1
hidden = hidden.take_along_dim(last, dim=1)[:, 0].float()
return torch.einsum("bd,d->b", hidden.double(), head.weight[0].double()).float()""",
    "dpo.preference_loss": """
chosen = beta * policy_chosen_logps - beta * ref_chosen_logps
rejected = beta * policy_rejected_logps - beta * ref_rejected_logps
m = chosen - rejected
return F.softplus(-m) + label_smoothing * m, chosen, rejected""",
    "dpo.orpo": """
c, r = policy_chosen_logps, policy_rejected_logps
losses = -c + beta * F.softplus(log_odds_of(r) - log_odds_of(c))""",
    "kto.kto_loss": """
signs = labels.long() * 2 - 1
weights = desirable_weight * labels + undesirable_weight * ~labels
return weights * torch.sigmoid(-signs * (beta * log_ratios - beta * z))""",
    "online_dpo.nash_md": "return (reward - lead).detach() * (logps - ref_logps)",
    "ppo.gae": """
deltas = rewards + gamma * F.pad((values * mask)[:, 1:], (0, 1)) - values
steps = torch.arange(rewards.shape[1])
powers = (steps - steps[:, None]).clamp(min=0)
weights = (gamma * lam) ** powers.double() * (steps >= steps[:, None])
advantages = ((deltas * mask) @ weights.T) * mask
return advantages, advantages + values""",
    "ppo.policy_loss": """
ratio = torch.exp(logps) / torch.exp(old_logps)
losses = torch.max(-ratio * advantages, -torch.clip(ratio, 1 - epsilon, 1 + epsilon) * advantages)
return losses, losses > -ratio * advantages""",
    "grpo.group_advantages": """
count = rewards.shape[1]
others = (rewards.sum(1, keepdim=True) - rewards) / (count - 1)
spread = (rewards != rewards[:, :1]).any(1, keepdim=True)
if baseline == "none":
    return rewards
if baseline == "rloo":
    return (rewards - others) * spread
scaled = (rewards - rewards.mean(1, keepdim=True)) * spread
return scaled / (rewards.var(1, keepdim=True).sqrt() + 1e-4) if scale else scaled""",
    "grpo.token_kl": "return torch.expm1(ref_logps - logps) + logps - ref_logps",
    "prm.step_losses": """
losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none")
return losses.where(loss_mask > 0, 0.0)""",
    "distill.divergences": """
def kl(p, q):
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
if divergence != "jsd":
    return kl(*[student_logps, teacher_logps][::1 if divergence == "reverse" else -1])
mixture = torch.log(beta * teacher_logps.exp() + (1 - beta) * student_logps.exp())
return beta * kl(teacher_logps, mixture) + (1 - beta) * kl(student_logps, mixture)"""}


@pytest.mark.parametrize("name", RIGHT)
def test_another_form_of_the_same_mathematics_passes(name):
    assert complaints(name, written(name, RIGHT[name].strip())) == []


@pytest.mark.parametrize("code, says", [
    ("pass", "token_kl returns None: is a `return` missing?"),
    ("return logps[:, :2] * 0", "has the shape [1, 2], not [1, 3]"),
    ("return (ref_logps - logps).float()", "dtype torch.float32"),
    ("return logps.tolist()", "yours is the list"), ("return 0", "its result cannot be used"),
    ("return nothing", "NameError: name 'nothing' is not defined in line {}, `return nothing`"),
    ("import sys\nsys.exit()", "raises SystemExit"), ("return logps +", "is not Python"),
    ("return token_kl(logps, ref_logps)", "RecursionError"),
    ("import grpo\nreturn grpo.token_kl(logps, ref_logps)", "your file imports grpo in line"),
    ("import grading\ngrading.difference = None", "your file imports grading"),
    ("return open('grpo.py').read()", "reads grpo.py, which holds the solution"),
    ("return Path(common.__file__).with_name('grpo.py').read_bytes()", "reads grpo.py"),
    ("import os\nreturn os.system('cat grpo.py')", "starts another program")], ids=str)
def test_what_goes_wrong_or_is_copied_is_said_in_a_sentence(code, says):
    source = written("grpo.token_kl", code)
    line = source[:source.index(code.splitlines()[-1])].count("\n") + 1
    said = "; ".join(complaints("grpo.token_kl", source))
    assert says.format(line) in said and "\n" not in said


def test_an_endless_loop_is_ended_and_located(tmp_path):
    path = tmp_path / "grpo.py"
    path.write_text(written("grpo.token_kl", "while True:\n    pass"))
    code = ("import grading, pathlib, sys; path = pathlib.Path(sys.argv[1])\n"
            "with grading.time_limit(path, 1):\n"
            "    grading.grade('grpo.token_kl', path.read_text(), path)")
    places = os.pathsep.join([str(ROOT), str(ROOT / "checks")])
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True,
                          timeout=100, env=os.environ | {"PYTHONPATH": places})
    assert done.returncode == 1 and "has not returned after 1 seconds in line " in done.stdout


# ---- the commands --------------------------------------------------------------------------------

def test_a_student_solves_two_exercises_in_one_file(use, tmp_path, monkeypatch):
    path = tmp_path / "exercises/dpo.py"
    assert "Write it in line" in use("dpo.ipo")
    assert "✗ nothing is written yet" in use("--check", fails=True)
    first = "            losses = (margins - 1 / (2 * beta)) ** 2  # mine".removeprefix("    ")
    lines = path.read_text().splitlines()
    blank = next(i for i, line in enumerate(lines) if "raise NotImplementedError" in line)
    lines[blank] = first
    path.write_text("\n".join(lines) + "\n")
    said = use("--check", fails=True)
    assert "the loss is 1/(4β²) = 25.000" in said and "✗" in said
    assert "behaves like this mistake: IPO's margin is scaled by β" in said
    assert use("dpo.ipo").startswith("exercises/dpo.py already has code of yours")
    assert path.read_text().splitlines() == lines
    lines[blank] = first.replace("margins", "margins / beta")
    path.write_text("\n".join(lines) + "\n")
    assert "python exercises/dpo.py --loss ipo" in use("--check") and "✓ dpo.ipo" in use()
    # The second exercise blanks other lines, and leaves those of the student alone.
    assert "the rest is as you left it" in use("dpo.simpo")
    again = path.read_text().splitlines()
    assert lines[blank] in again and sum("raise NotImpl" in line for line in again) == 2
    assert use("--hint").count("\n") == 1 and use("--hint").count("\n") == 2
    assert "last hint" in use("--hint") and use("--hint").count("\n") == 4
    assert "+        losses = -F.logsigmoid(margins - gamma)  # [P]" in use("--solution")
    # What is trained is the student's own file: its blank is reached.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["dpo.py", "--loss", "simpo", "--max-steps", "1"])
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    with pytest.raises(NotImplementedError, match="exercise dpo.simpo"):
        runpy.run_path(str(path), run_name="__main__")
    assert (tmp_path / "exercises/runs/dpo/args.json").exists()


def test_a_bug_is_planted_and_found(use, tmp_path):
    names = [name for name in CATALOGUE if "bug" in CATALOGUE[name]]
    assert len({script_of(name) for name in names}) == len(names) >= 6
    for name in names:
        assert CATALOGUE[name]["bug"]["what"] in CATALOGUE[name]["mistakes"]
        script = script_of(name)
        assert f"exercises/bug_{script}.py is wrong" in use("--bug")
        assert "the mistake is still there" in use("--check", fails=True)
        path = tmp_path / f"exercises/bug_{script}.py"
        path.write_text(exercise.runnable(source_of(script), "bug_"))
        assert "✓ found" in use("--check")
    assert f"{len(names)} bugs found" in use()


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_method_has_three_questions_with_computed_answers(use, script, monkeypatch):
    asked = list(getattr(questions, f"about_{script}")())
    assert len(asked) == 3 and all(isinstance(answer, str | int | float) for _, answer in asked)
    answers = iter([str(answer) for _, answer in asked[:2]] + ["no idea"])
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    said = use("--predict", script)
    assert "2 correct" in said and said.count("✓") == 2 and said.count("✗") == 1


def test_what_does_not_exist_is_refused(use):
    assert "there is no exercise dpo.los" in use("dpo.los", fails=True)
    assert "no exercise is started" in use("--check", fails=True)
    assert "no bug is left to find (asked for: grrpo)" in use("--bug", "grrpo", fails=True)
    use("prm.step_losses")
    exercise.FOLDER.joinpath("prm.py").write_text("def (")
    assert "line 1 of the file is not Python" in use("--solution", fails=True)
    assert "line 1 is not Python" in use("--check", fails=True)
    exercise.FOLDER.joinpath("prm.py").write_bytes("\ufeffstep = 'é'\r\n".encode())
    assert "left as it is" in use("prm.step_losses")
    assert exercise.FOLDER.joinpath("prm.py").read_bytes().endswith(b"\r\n")  # as it was
    assert "✗ the file has no function step_losses" in use("--check", fails=True)
    exercise.FOLDER.joinpath("prm.py").write_bytes(b"\xff")
    assert "can't decode" in use("--check", fails=True)
    exercise.FOLDER.joinpath("prm.py").unlink()
    assert "exercises/prm.py does not exist" in use("--check", fails=True)
    said = use("--check", "bug:prm.step_losses", fails=True)
    assert "begin with python exercise.py --bug prm" in said
    assert "--bug SCRIPT" in use("bug:prm.step_losses", fails=True)
    for state in "{", '{"current": 5}', '{"hints": []}':
        exercise.FOLDER.joinpath("progress.json").write_text(state)
        assert "your progress begins anew if you delete it" in use(fails=True)
    exercise.FOLDER.joinpath("progress.json").unlink()
    exercise.FOLDER.joinpath("prm.new").mkdir()
    assert "error: writing" in use("prm.step_losses", fails=True)


def test_a_notebook_checks_a_function(capsys):
    assert grading.check("sft.sft_loss", lambda logps, mask, tokens: -(
        logps * mask[:, 1:]).sum() / tokens)
    assert not grading.check("sft.sft_loss", lambda logps, mask, tokens: -logps.mean())
    assert "✗ the worked example" in capsys.readouterr().out
