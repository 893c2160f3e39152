"""The yardstick for every method: any number of checkpoints answer the same prompts, and one table compares them.

    python evaluate.py                                       # the tiny model and every run on it that lies in runs/
    python evaluate.py Qwen/Qwen2.5-0.5B runs/dpo --dataset prompts.jsonl --output table.json
    python evaluate.py runs/dpo --reward my_rewards.py:shortness

A checkpoint is a saved run, a local folder or a Hub name. A dataset has the columns `prompt` (a string or messages) and `answer`.

    sampled   share of correct answers at --temperature, with a 95 % interval
    greedy    share of correct answers when the likeliest token is taken every time, with the same interval
    pass@k    chance that at least one of k samples is right (Chen et al. 2021, arXiv:2107.03374, eq. 1)
    reward    mean score of the sampled answers by --reward (default: `correct_answer`, so that it equals `sampled`)
    kl        KL from the first checkpoint in nats an answer: how far the checkpoint is from it
    length    tokens of a sampled answer
    stopped   share of the sampled answers that end by themselves, before --max-new-tokens
"""
import importlib.util
import json
import math
import re
import sys
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal, Optional

import common  # first, because it quiets what the others import
import datasets
import pyarrow.parquet
import torch
from tqdm import tqdm
from transformers import DynamicCache, HfArgumentParser

OnOff = Literal["auto", "on", "off"]


def arg(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Args:
    dataset: str = arg("tiny/data/prompt_heldout.jsonl", "Hub name or .json, .jsonl or .parquet file with the columns prompt and answer")
    split: str = arg("test", "split of a Hub dataset")
    size: int = arg(300, "number of prompts at most")
    samples_per_prompt: int = arg(4, "sampled answers to each prompt")
    k: Optional[int] = arg(None, "the k of pass@k, at most --samples-per-prompt (default: that many)")
    temperature: float = arg(1.0, "of the sampled answers")
    max_new_tokens: int = arg(256, "longest answer")
    batch_size: int = arg(64, "answers generated at a time")
    reward: Optional[str] = arg(None, "FILE.py:function, called with lists: prompts, completions and every other column by its name; returns a score each")
    load_in_4bit: OnOff = arg("auto", "quantise the models; auto: on CUDA")
    seed: int = arg(0, "of the sampling")
    output: Optional[str] = arg(None, "also save the table in this new .json file")


# ---- data and scores --------------------------------------------------------------------------------------

def load_rows(source, split, limit, seed):
    """The rows of a local .json, .jsonl or .parquet file, or up to `limit` shuffled ones of a Hub dataset, as dicts."""
    path, where = Path(common.find(source)), source
    try:
        if path.suffix == ".parquet":
            rows = pyarrow.parquet.read_table(path).to_pylist()
        elif path.suffix in (".json", ".jsonl"):
            rows, text = [], path.read_text(encoding="utf-8-sig")
            if text.lstrip().startswith("[") and path.suffix == ".json":
                rows, text = json.loads(text), ""
            for number, line in enumerate(text.split("\n"), 1):
                where = f"{source}, line {number},"
                rows += [json.loads(line)] if line.strip() else []
        else:
            where = f"{source} is no .json, .jsonl or .parquet file, and as a dataset of the Hub, split {split}, it"
            rows = datasets.load_dataset(source, split=split).shuffle(seed=seed)
            rows = rows.select(range(min(limit, len(rows)))).to_list()
    except Exception as error:  # of the disk, the parser or the Hub, each with types of its own
        common.fail(f"{where} cannot be read: {' '.join(str(error).split()):.200}")
    if not rows or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        common.fail(f"{source} " + ("must hold one JSON object per row" if rows else "is empty"))
    return rows


def final_answer(text):
    """What a text says in the end: the content of its last \\boxed{}, else its last number, else None. Numbers are Fractions, so that 3.0 is 3."""
    def parse(digits):
        over, _, under = digits.replace(",", "").partition("/")
        try:
            return Fraction(over) / Fraction(under or 1)
        except (ValueError, ZeroDivisionError):  # 1/0, or thousands of digits
            return digits

    number = r"-?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?![0-9])(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?(?:/[0-9]+)?"  # 1,000 but not 1,2
    text = text.replace("−", "-")
    start = text.rfind("\\boxed{")
    if start < 0:
        numbers = re.findall(r"(?<![\w.])" + number, text)
        return parse(numbers[-1]) if numbers else None
    depth, end = 1, start + len("\\boxed{")
    while end < len(text) and depth:
        depth, end = depth + (text[end] == "{") - (text[end] == "}"), end + 1
    inside = text[start + len("\\boxed{"):end - (depth == 0)]
    inside = re.sub(r"\\[$!,]", "", inside)  # \$18, 1\,000
    alone = re.fullmatch(rf"[\s$]*({number})[\s$.%]*", re.sub(r"\\text\{[^}]*\}", "", inside))  # 21 \text{ apples}
    return parse(alone[1]) if alone else "".join(re.sub(r"\\text\{([^}]*)\}", r"\1", inside).split()).strip("$") or None  # a formula, or words


def correct_answer(prompts, completions, answer=None, solution=None, **columns):
    """1.0 where the completion's last \\boxed{} or number is the row's `answer` (or `solution`, as some datasets call it), else 0.0."""
    def final_truth(truth):  # a sentence is compared by its last number, a bare formula or words without a number as a whole
        truth = str(truth).split("####")[-1]  # where GSM8K puts its answer
        sentence = "\\boxed{" in truth or " " in truth.strip() and "\\" not in truth
        said = final_answer(truth) if sentence else None
        return final_answer(f"\\boxed{{{truth}}}") if said is None else said

    nothing = [None] * len(completions)
    truths = [solution if answer is None else answer for answer, solution in zip(answer or nothing, solution or nothing)]
    pairs = [(final_answer(text), final_truth(truth)) for text, truth in zip(completions, truths)]
    return [float(given is not None and given == truth) for given, truth in pairs]


def load_function(spec):
    """The function that `FILE.py:function` names."""
    file, _, name = spec.rpartition(":")
    if not Path(file).is_file() or Path(file).suffix != ".py":
        common.fail(f"--reward {spec}: no Python file {file!r}; write it as FILE.py:function")
    module_spec = importlib.util.spec_from_file_location(f"reward_{Path(file).stem}", file)
    module = sys.modules[module_spec.name] = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        common.fail(f"--reward {spec}: {file} cannot be imported: {type(error).__name__}: {error}")
    if not callable(getattr(module, name, None)):
        common.fail(f"--reward {spec}: {file} has no function {name!r}")
    return getattr(module, name)


def call_rewards(functions, rows, completions):
    """Scores of each function for each completion, [functions, rows]. A function that fails ends the run with a row shown."""
    names = {name for row in rows for name in row} - {"prompt", "prompt_ids", "prompts", "completions"}
    columns = {name: [row.get(name) for row in rows] for name in sorted(names)}
    scores = []
    for name, function in functions.items():
        try:
            given = [float(score) for score in function(prompts=[row["prompt"] for row in rows], completions=completions, **columns)]
            problem = f"gave {len(given)} scores for {len(rows)} completions" if len(given) != len(rows) else ""
        except Exception as error:  # the user's code may raise anything
            given, problem = [], f"raised {type(error).__name__}: {error}"
        bad = [i for i, score in enumerate(given) if not math.isfinite(score)]
        if problem or bad:
            i = bad[0] if bad else 0
            shown = {k: v for k, v in rows[i].items() if k != "prompt_ids"} | {"completion": completions[i]}
            common.fail(f"the reward {name} {problem or f'gave {given[i]}, no finite number'}; row: {json.dumps(shown, default=str):.500}")
        scores.append(given)
    return torch.tensor(scores, dtype=torch.float64)


def pass_at_k(right, count, k):
    """Unbiased chance that one of k samples is right, when `right` of `count` were: 1 minus the chance of drawing k wrong ones."""
    return 1 - math.comb(count - right, k) / math.comb(count, k)


def wilson(share, count):
    """95 % interval of a share (Wilson 1927). For sampled answers `count` is the number of prompts, as answers to one prompt are alike: rather too wide."""
    z = 1.96
    center, spread = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return [max(0.0, (center - spread) / (1 + z * z / count)), min(1.0, (center + spread) / (1 + z * z / count))]


# ---- log-probs --------------------------------------------------------------------------------------------

class ChunkedLogps(torch.autograd.Function):
    """log softmax(hidden @ head.T / temperature)[targets] for a frozen head, without ever holding all logits.

    For logits z = hidden @ head.T / temperature and a target y, d log p(y) / d hidden = (head[y] − softmax(z) @ head) / temperature
    does not depend on the loss: it is computed together with the log-prob, one chunk at a time, and `backward` only multiplies.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, temperature, chunk):
        logps, slopes = [], []
        for h, y in zip(hidden.split(chunk), targets.split(chunk)):  # [C, D], [C]
            logits = h @ head.T  # [C, V]
            logp = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)  # [C, V]
            logps.append(logp.gather(1, y[:, None])[:, 0])  # [C]
            if ctx.needs_input_grad[0]:
                slopes.append(((head[y] - logp.exp().to(head.dtype) @ head) / temperature).to(h.dtype))  # [C, D]
        ctx.save_for_backward(*([torch.cat(slopes)] if slopes else []))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad_logps):
        (slopes,) = ctx.saved_tensors  # [N, D]
        return (grad_logps[:, None] * slopes).to(slopes.dtype), None, None, None, None


def completion_logps(model, input_ids, attention_mask, loss_mask, temperature=1.0):
    """logps [B, T-1]: column t is log p(token t+1 | tokens ≤ t), 0 outside the mask; and the hidden states [N, D] of the N scored positions."""
    causal = common.causal_lm(model)
    scored = loss_mask[:, 1:].bool()  # [B, T-1]: position t predicts token t+1
    if not scored.any():
        raise ValueError("a batch without a single trained token")
    hidden = causal.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state  # [B, T, D]
    hidden, head = hidden[:, :-1][scored], causal.get_output_embeddings().weight  # [N, D], [V, D]
    chunk = max(1, 2**25 // len(head))  # 128 MiB of fp32 logits at a time
    flat = ChunkedLogps.apply(hidden, head, input_ids[:, 1:][scored], temperature, chunk)  # [N]
    return torch.zeros(scored.shape, dtype=flat.dtype, device=flat.device).masked_scatter(scored, flat), hidden


# ---- sampling ---------------------------------------------------------------------------------------------

@torch.no_grad()
def sample(model, prompts, samples_per_prompt, max_new_tokens, temperature, stop_ids, pad_id, seed):
    """Completions from exactly softmax(logits / temperature): no top-k, no top-p, no penalties. Temperature 0 takes the likeliest token.

    prompts: P lists of ids. Returns P × samples_per_prompt lists of new ids, grouped by prompt; each ends with its stop token
    unless it ran into max_new_tokens. A row's random numbers are its own, whatever happens in the other rows.
    """
    was_training = model.training
    model.eval()  # in train mode gradient checkpointing would silently drop the cache
    causal = common.causal_lm(model)
    rows, width = len(prompts) * samples_per_prompt, max(map(len, prompts))
    input_ids = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in prompts], device=causal.device)  # [P, T], padded on the left
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=causal.device)  # [P, T]
    noise = torch.rand(rows, max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(causal.device)
    new_ids = torch.full((rows, max_new_tokens), -1, device=causal.device)
    alive = torch.arange(rows, device=causal.device)  # rows that have not stopped

    cache = DynamicCache(config=causal.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = causal(input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits[:, -1]  # [P, V]
    cache.batch_repeat_interleave(samples_per_prompt)  # each prompt was read once, for all of its samples
    logits, mask = logits.repeat_interleave(samples_per_prompt, 0), mask.repeat_interleave(samples_per_prompt, 0)
    for step in range(max_new_tokens):
        if temperature == 0:
            token = logits.argmax(-1)  # [alive]
        else:  # the first token at which the cumulative probability exceeds the noise; fp64, or rare tokens at the end get lost
            cumulative = (logits.float() / temperature).softmax(-1).double().cumsum(-1)  # [alive, V]
            token = torch.searchsorted(cumulative, noise[alive, step, None] * cumulative[:, -1:], right=True)[:, 0]
        new_ids[alive, step] = token
        going = ~torch.isin(token, torch.tensor(stop_ids, device=causal.device))
        if step == max_new_tokens - 1 or not going.any():
            break
        if not going.all():  # finished rows leave the batch
            alive, token, mask = alive[going], token[going], mask[going]
            cache.batch_select_indices(going.nonzero()[:, 0])
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = causal(input_ids=token[:, None], attention_mask=mask, position_ids=mask.sum(-1, keepdim=True) - 1, past_key_values=cache).logits[:, -1]
    model.train(was_training)
    return [[i for i in row if i >= 0] for row in new_ids.tolist()]


# ---- the table --------------------------------------------------------------------------------------------

def collate(prompts, completions, pad_id, device):
    """B prompts with their completions as one batch [B, T], padded on the right; the mask is on what was sampled."""
    rows = [prompt + completion for prompt, completion in zip(prompts, completions)]
    width = max(map(len, rows))
    batch = {
        "input_ids": [row + [pad_id] * (width - len(row)) for row in rows],
        "attention_mask": [[1] * len(row) + [0] * (width - len(row)) for row in rows],
        "loss_mask": [[0] * len(p) + [1] * len(c) + [0] * (width - len(p) - len(c)) for p, c in zip(prompts, completions)],
    }
    return {name: torch.tensor(value, device=device) for name, value in batch.items()}


def kl_from(first, model, prompts, completions, temperature, pad_id):
    """KL(model ‖ first) in nats an answer, by the estimator k3 (Schulman 2020): Σ_t r − 1 − log r with r = p_first / p_model, on the model's own samples."""
    batch = collate(prompts, completions, pad_id, common.causal_lm(model).device)
    log_ratio = completion_logps(first, **batch, temperature=temperature)[0] - completion_logps(model, **batch, temperature=temperature)[0]  # [B, T-1]
    return (log_ratio.exp() - 1 - log_ratio).sum(-1)  # [B]; 0 outside the mask


@torch.no_grad()
def measure(name, rows, args, score, first=None):
    """One row of the table, and (model, tokenizer) so that the first checkpoint can be kept for the KL of the others."""
    tokenizer = common.load_tokenizer(name)
    try:
        prompts = [common.encode_prompt(tokenizer, row["prompt"]) for row in rows]
    except ValueError as error:
        common.fail(f"{args.dataset} with the model {name}: {error}")
    if (longest := max(map(len, prompts))) + args.max_new_tokens > tokenizer.model_max_length:
        common.fail(f"{name} reads {tokenizer.model_max_length} tokens, and a prompt of {args.dataset} has {longest}: lower --max-new-tokens, or leave it out")
    model = common.load_model(name, load_in_4bit=args.load_in_4bit, trainable=False)
    stop_ids = common.stop_token_ids(tokenizer, model.generation_config)
    results = {"sampled": [], "greedy": [], "reward": [], "kl": [], "length": [], "stopped": []}
    for mode, temperature, repeats in (("sampled", args.temperature, args.samples_per_prompt), ("greedy", 0.0, 1)):
        size = max(1, args.batch_size // repeats)
        for i in tqdm(range(0, len(rows), size), desc=f"{name} {mode}", leave=False):
            part = [row for row in rows[i:i + size] for _ in range(repeats)]
            ids = sample(model, prompts[i:i + size], repeats, args.max_new_tokens, temperature, stop_ids, tokenizer.pad_token_id, args.seed + i)
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            results[mode] += call_rewards({"correct_answer": correct_answer}, part, texts)[0].tolist()
            if mode == "greedy":
                continue
            results["reward"] += call_rewards({args.reward: score}, part, texts)[0].tolist() if args.reward else results[mode][-len(part):]
            results["length"] += [len(row) for row in ids]
            results["stopped"] += [row[-1] in stop_ids for row in ids]
            if first and first[1].get_vocab() == tokenizer.get_vocab():
                repeated = [prompt for prompt in prompts[i:i + size] for _ in range(repeats)]
                results["kl"] += kl_from(first[0], model, repeated, ids, temperature, tokenizer.pad_token_id).tolist()
    means = {column: sum(values) / len(values) if values else None for column, values in results.items()}
    groups = [results["sampled"][i:i + args.samples_per_prompt] for i in range(0, len(results["sampled"]), args.samples_per_prompt)]
    means[f"pass@{args.k}"] = sum(pass_at_k(int(sum(group)), len(group), args.k) for group in groups) / len(groups)
    intervals = {f"{mode}_interval": wilson(means[mode], len(rows)) for mode in ("sampled", "greedy")}
    return {"checkpoint": name, **means, "kl": means["kl"] if first else 0.0, **intervals}, (model, tokenizer)


def main():
    parser = HfArgumentParser(Args, description=__doc__.split("\n")[0])
    parser.error = lambda message: common.fail(f"{message} (--help lists all flags)")
    parser.add_argument("checkpoints", nargs="*", help="saved runs, local folders or Hub names (default: tiny/chat and the runs on it in runs/)")
    args, names, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        parser.error(f"there is no flag {unknown[0]}")
    runs = [path.parent for path in sorted(Path("runs").glob("*/summary.json")) if json.loads(path.read_text())["method"] != "reward_model"]
    names = names.checkpoints or ["tiny/chat", *(str(run) for run in runs if common.is_tiny(str(run)))]
    args.k = args.samples_per_prompt if args.k is None else args.k
    for name in ("size", "samples_per_prompt", "k", "max_new_tokens", "batch_size", "temperature"):
        if not 0 < getattr(args, name) < math.inf:
            common.fail(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    if args.k > args.samples_per_prompt:
        common.fail(f"--k {args.k} needs at least as many --samples-per-prompt, not {args.samples_per_prompt}")
    if args.output and (Path(args.output).exists() or not Path(args.output).parent.is_dir()):
        common.fail(f"--output {args.output} exists already, or its folder does not: name a new file")
    score = load_function(args.reward) if args.reward else correct_answer
    rows = load_rows(args.dataset, args.split, args.size, args.seed)[:args.size]
    for number, row in enumerate(rows, 1):
        if missing := [column for column in ("prompt", "answer") if row.get(column) is None]:
            common.fail(f"{args.dataset}, row {number}, has no {' and no '.join(missing)}: it has {', '.join(row)}, wanted are prompt, answer")
        if not row["prompt"] or not isinstance(row["prompt"], (str, list)):
            common.fail(f"{args.dataset}, row {number}: the prompt must be a string or a list of messages, and not empty")

    for name in names:  # before the first is measured, to no avail if the second is not there
        common.load_tokenizer(name)
    table, first = [], None
    for name in names:
        line, loaded = measure(name, rows, args, score, first)
        table, first = table + [line], first or loaded
    width = max(len(name) for name in names + ["checkpoint"])
    print(f"\n{len(rows)} prompts of {args.dataset}, {args.samples_per_prompt} samples each at temperature {args.temperature}\n")
    print(f"{'checkpoint':<{width}}  {'sampled':>19}  {'greedy':>19}  {f'pass@{args.k}':>7}  {'reward':>7}  {'kl':>7}  {'length':>6}  {'stopped':>7}")
    for line in table:
        shares = [f"{line[mode]:.3f} ({line[mode + '_interval'][0]:.3f}–{line[mode + '_interval'][1]:.3f})" for mode in ("sampled", "greedy")]
        kl = "-" if line["kl"] is None else f"{line['kl']:.3f}"
        print(f"{line['checkpoint']:<{width}}  {shares[0]:>19}  {shares[1]:>19}  {line[f'pass@{args.k}']:7.3f}  {line['reward']:7.3f}  {kl:>7}"
              f"  {line['length']:6.1f}  {line['stopped']:7.3f}")
    if args.output:
        Path(args.output).write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
