"""The code that all scripts share: flags, errors, models, adapters, chat templates, dataset rows.

A model is a name on the Hub, a local folder, or a LoRA adapter (Hu et al. 2021, arXiv:2106.09685)
on a frozen base, which a GPU holds in 4 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

A dataset row becomes a list of pieces, from which each script builds its examples. A piece is a
pair (ids, is_answer): token ids, and whether the model should learn to produce them. For example,
the system message "Be brief." and the question "2 + 2?" with the answer "4" become

    [([1, 11, 42, 2], False), ([1, 12, 8, 5, 8, 2, 1, 13], False), ([9, 2], True)]
      BOS, system message      question, header of the answer       answer, end of turn

The first piece is the head, which truncation keeps, and the second is the rest of the prompt. Later
turns follow in the same way. A row that cannot be used raises a ValueError that states the reason.
"""
import argparse
import contextlib
import csv
import functools
import gzip
import hashlib
import importlib
import inspect
import itertools
import json
import logging
import os
import re
import runpy
import shlex
import sys
import time
import traceback
import types
import warnings
from importlib.metadata import version
from pathlib import Path

import huggingface_hub
import torch
import torch.distributed as dist
from tqdm import tqdm


def later(name: str):
    """A stand-in that imports a module at its first use, because these imports take seconds.

    `--help` and misspelled flags need none of these modules, so they are answered at once.
    """
    module = types.ModuleType(name)
    module.__getattr__ = lambda attribute: getattr(importlib.import_module(name), attribute)
    return module


bitsandbytes = later("bitsandbytes")
datasets = later("datasets")
jinja2 = later("jinja2")
parquet = later("pyarrow.parquet")
peft = later("peft")
transformers = later("transformers")
HERE = Path(__file__).resolve().parent
# torchrun starts WORLD processes and gives each of them its RANK. A single process has rank 0.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


# ---- errors --------------------------------------------------------------------------------------

USER_FILES = set()  # files with reward functions; an error message quotes the line that failed


def need(condition, message: str):
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def visible(text: str) -> str:
    """The text with its control characters escaped, so that data cannot move the cursor."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def print_traceback():
    """Prints the traceback of the current exception if TRACEBACK=1 is in the environment."""
    if os.environ.get("TRACEBACK") == "1" and sys.exc_info()[0]:
        traceback.print_exc()


def fail(message: str):
    """Reports an error that the user can fix: prints one line and exits with code 2."""
    # If every process fails, only rank 0 reports it: torchrun stops the others while they sleep.
    time.sleep(3 if RANK > 0 else 0)
    # Otherwise, the message would be appended to the line of an open progress bar.
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print_traceback()
    print(f"error: {visible(' '.join(message.split())):.500}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def phase(doing: str):
    """Turns an exception into one line that says what failed and why; TRACEBACK=1 shows where.

    Libraries raise exceptions of every type when they read a broken file, and so do the reward
    functions of users. If the exception comes from a reward function, the message quotes the line
    of the user's file that raised it. Exceptions that `running` handles pass through, and so does
    a NameError in a script, because that is a bug that no input can cause.
    """
    try:
        yield
    except (torch.OutOfMemoryError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        places = [f"{frame.filename}:{frame.lineno}: {frame.line}: " for frame in frames
                  if frame.filename in USER_FILES]
        if isinstance(error, NameError) and not places:
            raise
        place = places[-1] if places else ""
        # `datasets` hides the reason in a chain of causes, and a chain may be circular.
        for _ in range(9):
            error = error.__cause__ or error
        fail(f"{doing}: {place}{type(error).__name__}: {str(error) or 'no reason given'}")


ADVICE = {"KeyboardInterrupt": "interrupted{resumes}",
          "BrokenPipe": "the program that read the output has ended{resumes}",
          "MemoryError|allocate memory|out of memory|ALLOC_FAILED": "out of memory: lower {flags}",
          # torch.save reports a full disk as an error in inline_container.cc.
          "No space left|[Dd]isk quota|inline_container": "the disk is full{resumes}"}


@contextlib.contextmanager
def running(memory_flags: str, resumes: str = "; the same command resumes an interrupted run"):
    """Wraps a whole run: connects its processes; turns errors that can occur anywhere into a line.

    `resumes` ends the message of an interrupted run. It is "" for a program that cannot resume.
    """
    # A closed standard stream is None, and the next file to be opened would get its descriptor.
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if RANK > 0 or not sys.stdout:
        sys.stdout = open(os.devnull, "w")
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals without Unicode
    if WORLD > 1:
        dist.init_process_group("nccl" if choose_device().type == "cuda" else "gloo")
    try:
        yield
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError):
            # Python flushes standard output once more when it exits, and would fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        for pattern, advice in ADVICE.items():
            if re.search(pattern, f"{type(error).__name__}: {error}"):
                fail(advice.format(flags=memory_flags, resumes=resumes))
        raise
    if WORLD > 1:
        dist.destroy_process_group()


# ---- flags ---------------------------------------------------------------------------------------

def number(kind: type, low: float, high: float = 1e9):
    """An argparse type: a number between two bounds. NaN is never between them."""
    def within(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return kind(text)

    within.__name__ = kind.__name__  # argparse prints it: "invalid int value"
    return within


count = number(int, 1)
natural = number(int, 0)
positive = number(float, 1e-9)
weight = number(float, 0)
share = number(float, 0, 1)


def variables(text: str) -> dict:
    """An argparse type: the variables of a chat template, as a JSON object."""
    values = json.loads(text)
    if not isinstance(values, dict) or not all(name.isidentifier() for name in values):
        raise argparse.ArgumentTypeError('it must be an object such as {"enable_thinking": false}')
    return values


ON_GPU = {"choices": ["on", "off"], "default": "on" if torch.cuda.is_available() else "off"}
LORA_RANK = {"default": 16, "help": "rank of the LoRA matrices, which are added to all linear "
             "layers; alpha is twice the rank; an adapter that is loaded keeps its own rank"}
COLUMNS = {"nargs": "+", "default": [], "metavar": "NAME=COLUMN",
           "help": "names of columns: prompt=query reads the column `query` as the prompt"}
VARIABLES = {"type": variables, "metavar": '{"enable_thinking": false}',
             "help": "variables for the chat template, as a JSON object"}
FOUR_BIT = {**ON_GPU, "help": "4-bit quantization (NF4) of the frozen weights, to save memory"}
CHECKPOINTING = {**ON_GPU, "help": "recomputation of activations in the backward pass, to save "
                 "memory"}
TEMPLATE = "file with a chat template that replaces the model's own"
PEAK = "peak learning rate (linear warm-up over 10%% of the steps, then cosine decay)"
RESUMED = "output folder; the same command resumes an interrupted run"


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows a script's docstring as it is, and the default of every flag that has one."""

    def _get_help_string(self, action):
        has_default = action.default not in (None, [])
        return super()._get_help_string(action) if has_default else action.help


def parse(flags: argparse.ArgumentParser, tiny: dict | None = None, by_loss: dict | None = None):
    """Parses the command line. The tiny model and some losses have defaults of their own."""
    flags.error = fail
    args = flags.parse_args()
    defaults = dict(by_loss.get(args.loss, {})) if by_loss else {}
    if tiny and is_tiny(args.model):
        defaults |= tiny
        # The tiny model's held-out rows go with its own training rows only.
        if flags.parse_args(namespace=argparse.Namespace(**defaults)).dataset != tiny["dataset"]:
            defaults["eval_dataset"] = None
    if getattr(args, "lora_rank", None) == 0:
        # Full fine-tuning needs a smaller learning rate than LoRA.
        peak = defaults.get("learning_rate", flags.get_default("learning_rate"))
        defaults["learning_rate"] = peak / 10
    # argparse uses a flag's own default only if the namespace has no value for it yet.
    args = flags.parse_args(namespace=argparse.Namespace(**defaults))
    if "output_dir" in args:
        with phase(f"--output-dir {args.output_dir}"):
            # A name that is not UTF-8 fails in encode(), not after training, when files are saved.
            is_new = args.output_dir.encode() and not Path(args.output_dir, "summary.json").exists()
            need(is_new, "the name is empty, or the folder holds a finished run: name another one")
    return args


# ---- device and number format --------------------------------------------------------------------

def choose_device() -> torch.device:
    """The GPU of this process (torchrun sets LOCAL_RANK), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # bitsandbytes and NCCL use the current device.
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


def choose_dtype(device: torch.device) -> torch.dtype:
    """fp32 on a CPU, bf16 from compute capability 8.0 on, else fp16: a T4 only emulates bf16."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def autocast(model):
    """A context in which forward passes on a GPU compute in 16 bits; trained weights stay fp32."""
    kind = model.device.type
    return torch.autocast(kind, choose_dtype(model.device), enabled=kind == "cuda")


def grad_scaler(model):
    """A loss scaler for fp16, in which small gradients round to 0. It is off in bf16 and fp32."""
    fp16 = choose_dtype(model.device) == torch.float16
    scaler = torch.amp.GradScaler(model.device.type, enabled=fp16)
    # The scale is created at the first use. A checkpoint saved before that would lack it.
    scaler.scale(torch.zeros((), device=model.device))
    return scaler


def patch_libraries():
    """Patches libraries, each for a reason; a version is the one that made a patch necessary."""
    # bitsandbytes advertises a kernel when it is imported, and huggingface_hub logs every retry.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    # These two log the errors that they also raise.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    # bitsandbytes 0.48: on a CPU with AVX512-BF16, a forward pass in evaluation mode repacks 4-bit
    # weights, and the next training step fails.
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    # transformers 5.0: turning on gradient checkpointing calls a deprecated method of its own.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
    # peft 0.17: if an adapter's file lacks weights, peft leaves them random and only warns.
    warnings.filterwarnings("error", "Found missing adapter keys")
    if choose_dtype(choose_device()) == torch.float16:
        # transformers 5.0: it sets enable_gqa, which sends SDPA to its slow math kernel on GPUs
        # older than Ampere. Without enable_gqa, transformers repeats keys and values itself.
        from transformers.integrations import sdpa_attention
        sdpa_attention.use_gqa_in_sdpa = lambda *args, **kwargs: False
    # Reading from disk needs no progress bars. Downloads do, but turning off those of transformers
    # turns off theirs as well.
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    if RANK == 0 and not huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS:
        huggingface_hub.utils.enable_progress_bars()


# ---- models --------------------------------------------------------------------------------------

SCORE = "base_model.model.score.weight"  # the key of a reward model's head in its adapter file
ANOTHER_BASE = "on another base: REWARD_MODEL=NAME, --reward examples/rewards.py:classifier"


def find(name: str) -> str:
    """`name` if it exists, else the path beside this file: tiny/chat is found from any folder."""
    return str(HERE / name) if not Path(name).exists() and (HERE / name).exists() else name


def adapter_config(name: str):
    """The config of a LoRA adapter, or None for a full model."""
    # Every use of a model begins here.
    patch_libraries()
    if not transformers.utils.peft_utils.find_adapter_config_file(find(name)):
        return None
    config = peft.PeftConfig.from_pretrained(find(name))
    need(config.peft_type == "LORA", f"a {config.peft_type} adapter: only LoRA is supported")
    return config


def base_of(name: str) -> str:
    """The full model behind `name`: the model itself, or the base of an adapter."""
    adapter = adapter_config(name)
    return find(adapter.base_model_name_or_path if adapter else name)


def is_tiny(name: str) -> bool:
    """Whether `name` is an embedded model or was trained from one."""
    with phase(f"loading the model {name}"):
        base = Path(base_of(name))
        summary = base / "summary.json"
        if summary.exists():  # a run that trained all weights
            made = json.loads(summary.read_text())
            need(isinstance(made, dict), f"{summary} is not an object")
            base = Path(find(made.get("model", name)))
        return base.is_dir() and base.resolve().is_relative_to(HERE / "tiny")


def fingerprint(*names: str) -> str:
    """A hash of the model `names[0]`, of its base, and of reward functions FILE.py:function.

    An interrupted run can only be resumed if none of them has changed.
    """
    digest = hashlib.sha256()
    for name in [*names, base_of(names[0])]:
        path = Path(find(re.sub(r"\.py:.*", ".py", name)))
        for file in [path] if path.is_file() else sorted(path.glob("*")):
            if file.suffix in (".py", ".safetensors", ".bin", ".json", ".jinja", ".model"):
                with phase(f"reading {file}"), file.open("rb") as opened:
                    content = hashlib.file_digest(opened, "blake2b").hexdigest()
                digest.update(f"{file.name} {content} ".encode())
        # A Hub model is identified by its commit, which is part of its path in the cache.
        for config in [] if path.exists() else ["config.json", "adapter_config.json"]:
            cached = huggingface_hub.try_to_load_from_cache(name, config)
            digest.update(str(cached).encode())
    return digest.hexdigest()


def load_config(name: str):
    """The config of the base of `name`, with every kind of dropout turned off.

    Policy, reference and sampler must agree on every log-prob. OPT calls F.dropout in its forward
    pass, and Mistral's attention has a dropout of its own, so turning off nn.Dropout modules after
    loading would not be enough.
    """
    config = transformers.AutoConfig.from_pretrained(base_of(name), trust_remote_code=False)
    for part in [config, *vars(config).values()]:
        if isinstance(part, transformers.PreTrainedConfig):
            for key, value in list(vars(part).items()):
                if re.search("drop|jitter", key) and isinstance(value, float):
                    setattr(part, key, 0.0)
    return config


def load_base(name: str, dtype: torch.dtype, in_4bit: bool, task: str):
    """Loads the full model behind `name`, with all weights frozen."""
    device = choose_device()
    config = load_config(name)
    kind = transformers.AutoModelForCausalLM
    if task == "SEQ_CLS" and type(config) in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        kind = transformers.AutoModelForSequenceClassification
        config.num_labels = 1
    nf4 = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype)
    # With None, transformers uses SDPA, or eager attention for a class that supports nothing else.
    # Qwen must use SDPA, because eager attention overflows in fp16 there.
    attention = "sdpa" if config.model_type.startswith("qwen") else None
    model = kind.from_pretrained(
        base_of(name), config=config, dtype=dtype, device_map={"": device},
        quantization_config=nf4 if in_4bit else None, attn_implementation=attention,
        trust_remote_code=False)
    if task == "SEQ_CLS" and not hasattr(model, "score"):
        # A family without a class for it gets a scalar head beside the language model's head.
        width = config.get_text_config().hidden_size
        model.score = torch.nn.Linear(width, 1, bias=False, device=device, dtype=dtype)
    if choose_dtype(device) == torch.float16 and "gemma3" <= config.model_type < "gemma5":
        print(f"{config.model_type} overflows in fp16, the number format of this GPU: use a GPU "
              "with bf16 (Ampere or later), or another model")
    # We freeze by hand, because peft's prepare_model_for_kbit_training upcasts the embeddings to
    # fp32, which takes 2 GiB more for a 7B model.
    return model.requires_grad_(False)


def load_model(name: str, load_in_4bit: str = ON_GPU["default"], lora_rank: int = 16,
               gradient_checkpointing: str = ON_GPU["default"], trainable: bool = True,
               task: str = "CAUSAL_LM", keep_reference: bool = True):
    """Loads a frozen base with a LoRA adapter "default", which is trained in fp32.

    If `name` is an adapter, its own matrices are trained further, and with `keep_reference` a
    frozen copy of them stays as the adapter "reference". `lora_rank` 0 trains all weights, never
    in 4 bits; `trainable=False` trains none. The task SEQ_CLS makes a reward model: a scalar head,
    `score`, is trained and saved with the adapter.
    """
    if is_tiny(name):
        torch.set_num_threads(1)  # on matrices this small, threads only wait for each other
    with phase(f"loading the model {name}"):
        adapter = adapter_config(name)
        full = trainable and lora_rank == 0
        need(not (full and adapter), "--lora-rank 0 cannot start from an adapter")
        if adapter and adapter.task_type != task and (task == "CAUSAL_LM" or not trainable):
            raise ValueError(f"it is an adapter for {adapter.task_type}, not for {task}")
        # All weights are trained in fp32: in 16 bits, Adam's small updates would round to zero.
        dtype = torch.float32 if full else choose_dtype(choose_device())
        model = load_base(name, dtype, load_in_4bit == "on" and not full, task)
        if full:
            model.requires_grad_(True)
        elif adapter and adapter.task_type == task:
            model = peft.PeftModel.from_pretrained(model, find(name), is_trainable=trainable)
            if trainable and task == "CAUSAL_LM" and keep_reference:
                model.load_adapter(find(name), "reference", is_trainable=False)
        elif trainable:
            model = add_lora(model, name if adapter else None, lora_rank, task)
        # An adapter may have been trained with dropout.
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        # LoRA matrices, too, are trained in fp32. GradScaler refuses fp16 gradients.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if gradient_checkpointing == "on":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        check_forward(model, task)
    return model.train(trainable)


def add_lora(model, adapter_name: str | None, rank: int, task: str):
    """Adds new LoRA matrices; or, to start a reward model, those of a language model's adapter."""
    if adapter_name:
        config = adapter_config(adapter_name)
    else:
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear_layers(model))
    config.task_type = task
    config.inference_mode = False
    config.modules_to_save = ["score"] if task == "SEQ_CLS" else None
    model = peft.get_peft_model(model, config)
    if adapter_name:
        score = model.get_base_model().score.modules_to_save["default"].weight
        load_weights(model, adapter_name, "default", {SCORE: score})
    return model


@torch.no_grad()
def linear_layers(model) -> list[str]:
    """The names of the linear layers that text passes through on its way to the hidden states.

    A trial forward pass finds them, so that every LoRA matrix is used. The pass does not call the
    head, vision towers, or layers whose weights another module reads directly. Two kinds of layers
    are called but left out: routers that return several tensors, because LoRA cannot add to those,
    and Mamba's out_proj, which is called on a CPU, while on a GPU a kernel reads its weights. The
    pass is in training mode, because Gemma 3n calls one layer in evaluation mode only.
    """
    outputs = {}
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: outputs.update({module: output}))
    with autocast(model):
        model.train().base_model(input_ids=torch.tensor([[1, 2, 3]], device=model.device))
    hook.remove()
    linear = torch.nn.Linear | transformers.pytorch_utils.Conv1D
    return [name for name, module in model.named_modules()
            if isinstance(module, linear) and torch.is_tensor(outputs.get(module))
            and not name.endswith(("mamba.out_proj", "mixer.out_proj"))]


def load_weights(model, name: str, role: str, head: dict | None = None) -> dict:
    """Loads the file of `name` into the adapter `role`, and refuses a file that lacks weights."""
    weights = peft.load_peft_weights(find(name), device="cpu") | (head or {})
    # peft itself would leave missing weights random.
    missing = peft.set_peft_model_state_dict(model, weights, adapter_name=role).missing_keys
    need(not any(f".{role}." in key for key in missing), "its file lacks weights")
    check_weights(model)
    return weights


def causal_lm(model):
    """The model without peft's wrapper, but with LoRA. Its `base_model` is all except the head."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# ---- one forward pass, and the check that it is correct ------------------------------------------

# The name under which models take and return the KV cache. A model ignores a cache under any other
# name, and would then sample without its context, which `check_forward` would refuse.
IS_RECENT = tuple(map(int, version("transformers").split(".")[:2])) >= (5, 24)
CACHE = "cache" if IS_RECENT else "past_key_values"


def read(causal, ids, mask, cache=None):
    """Logits [B, V] after the last of the tokens `ids` [B, T], and the KV cache for the next call.

    The mask is 1 on all real tokens so far, both in the cache and in `ids`. The model creates the
    kind of cache that it needs; the cache's method `reorder_cache` repeats or drops rows.
    """
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]  # [B, T]
    out = causal(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
                 logits_to_keep=1, **{CACHE: cache})
    cache = out.get(CACHE)
    need(cache is not None, f"{type(causal).__name__} returns no cache to continue from")
    return out.logits[:, -1], cache


def read_out(causal, hidden):
    """Logits [..., V] from hidden states [..., D]: the head, then any scaling or soft-capping."""
    config = causal.config.get_text_config()
    logits = causal.get_output_embeddings()(hidden)
    scale = getattr(config, "logit_scale", None)  # Cohere
    scale = scale or getattr(config, "lm_head_multiplier", None) or 1  # Falcon-H1
    scale = scale / (getattr(config, "logits_scaling", None) or 1)  # Granite, MiniCPM3
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    logits = logits * scale if scale != 1 else logits
    return torch.tanh(logits / cap) * cap if cap else logits


def check_weights(model):
    """Refuses weights that are not finite. Their sums show it without a copy of the weights."""
    sums = [p.sum(dtype=torch.float32) for p in model.parameters() if p.is_floating_point()]
    need(all(x.isfinite() for x in sums), "its weights are not finite numbers")


def check_equal(model, found, expected, complaint: str):
    """Refuses the model if two tensors differ by more than the rounding of its number format."""
    limit = 0.001 if choose_dtype(model.device) == torch.float32 else 0.1
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    need(error <= limit, f"{type(model).__name__} {complaint} (error {error:.2g})")


@torch.no_grad()
def check_forward(model, task: str):
    """Refuses broken weights, and a model that the scripts would train or sample wrongly.

    Two rows, of 6 and 4 tokens, are read as in training and as in sampling, padded to one batch.
    The results must equal those of reading each row alone.
    """
    check_weights(model)
    causal = causal_lm(model).eval()
    ids = torch.tensor([[1, 2, 3, 2, 1, 3], [3, 2, 1, 3, 0, 0]], device=causal.device)
    rows = [ids[:1], ids[1:, :4]]
    with autocast(causal):
        alone = [causal.base_model(input_ids=row, use_cache=False)[0][0] for row in rows]
        alone = torch.cat(alone)  # [6 + 4, D]
        need(alone.isfinite().all(), "its hidden states are not finite numbers")
        # Training pads on the right. This also detects dropout that is still on.
        mask = (ids > 0).long()
        hidden = causal.train().base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        check_equal(causal.eval(), hidden[mask > 0], alone, "reads rows differently in training")
        if task == "SEQ_CLS":
            return
        # The logits are scaled up, because soft-capping hardly changes small ones.
        head = causal.get_output_embeddings()
        scale = 100 / head(alone).abs().max()
        hook = head.register_forward_hook(lambda *call: call[2] * scale)
        logits = [causal(input_ids=row, use_cache=False).logits[0] for row in rows]
        logits = torch.cat(logits)  # [6 + 4, V]
        check_equal(causal, read_out(causal, alone), logits, "changes its logits after the head")
        # Sampling pads on the left, and continues from a cache whose rows have been reordered. The
        # first call ends with token 4 of row 0 and token 2 of row 1; the last call, on the swapped
        # rows, ends with token 4 of row 1 and token 6 of row 0.
        left = torch.stack([ids[0], ids[1].roll(2)])
        first, cache = read(causal, left[:, :4], (left > 0)[:, :4].long())
        cache.reorder_cache(torch.tensor([1, 0], device=causal.device))
        left = left.flip(0)
        for length in 5, 6:
            mask = (left > 0)[:, :length].long()
            last, cache = read(causal, left[:, length - 1:length], mask, cache)
        found = torch.cat([first, last])
        check_equal(causal, found, logits[[3, 7, 9, 5]], "does not continue from its cache")
        hook.remove()


# ---- roles: several adapters on one base ---------------------------------------------------------

@contextlib.contextmanager
def using(model, role: str | None):
    """A context in which the model uses the adapter `role`, or no adapter if `role` is None."""
    outer = model.active_adapter
    # peft changes requires_grad when it switches adapters.
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        if role:
            model.set_adapter(role)
            yield
        else:
            with model.disable_adapter():
                yield
    finally:
        model.set_adapter(outer)
        for p, is_trained in trained:
            p.requires_grad_(is_trained)


def reference(model):
    """A context in which the model is π_ref: a frozen copy of the first adapter, or the base."""
    return using(model, "reference" if "reference" in model.peft_config else None)


def reward_config(name: str, policy: str):
    """The config of a reward model, saved by reward_model.py, that shares the base of `policy`."""
    with phase(f"loading the reward model {name} ({ANOTHER_BASE})"):
        config = adapter_config(name)
        need(config and config.task_type == "SEQ_CLS", "it was not saved by reward_model.py")
        summary = Path(find(name), "summary.json")  # tiny/reward has none
        made = summary.read_text() if summary.exists() else ""
        need(not re.search(r'"method"\s*:\s*"prm"', made),
             "prm.py saved it, and only pairs.py and evaluate.py can use scores of steps")
        base = base_of(name)
        wanted = base_of(policy)
        need(Path(base).resolve() == Path(wanted).resolve(),
             f"it and the policy must share one base, but its base is {base}, not {wanted}")
        # `add_role` keeps the head outside the model, so the adapter alone is added.
        config.task_type = "CAUSAL_LM"
        config.modules_to_save = None
    return config


def add_role(model, name: str | None, role: str, trainable: bool = False) -> torch.nn.Linear:
    """Adds the adapter of the reward model `name`, or a new one, and returns its scalar head.

    A new adapter changes nothing yet, and a new head gives the value 0.
    """
    own = model.peft_config["default"]
    trained = {key: p.requires_grad for key, p in model.named_parameters()}
    config = peft.LoraConfig(r=own.r, lora_alpha=own.lora_alpha, target_modules=own.target_modules)
    score = torch.zeros(1, causal_lm(model).config.get_text_config().hidden_size)
    if name:
        config = reward_config(name, own.base_model_name_or_path)
    with phase(f"loading the reward model {name} for the {role}"):
        model.add_adapter(role, config)
        if name:
            score = load_weights(model, name, role)[SCORE]
    for key, p in model.named_parameters():
        p.requires_grad_(trained.get(key, trainable))
    head = torch.nn.Linear(score.shape[1], 1, bias=False, device=model.device)
    head.weight.data.copy_(score)
    return head.requires_grad_(trainable)


@functools.cache
def run_file(path: str, changed: int) -> dict:
    """The names that a user's file defines. It runs once, and again only if it has changed."""
    USER_FILES.add(path)
    # Last in the path, so that a folder `datasets` beside the file does not shadow the library.
    sys.path.append(os.path.dirname(path))
    return runpy.run_path(path)


def load_function(name: str):
    """Loads a function, FILE.py:function. It may import modules that lie beside the file."""
    file, _, function = name.rpartition(":")
    with phase(f"loading {name} (the form is FILE.py:function)"):
        path = Path(find(file)).resolve()
        loaded = run_file(str(path), path.stat().st_mtime_ns)[function]
        # Whether a call of a callable object is async shows only in its class.
        forms = loaded, vars(type(loaded)).get("__call__")
        is_async = [inspect.iscoroutinefunction(x) or inspect.isasyncgenfunction(x) for x in forms]
        need(callable(loaded) and not any(is_async),
             "it must be a plain function, not async and not a value")
    return loaded


# ---- what a run reports and saves ----------------------------------------------------------------

def settings(model) -> dict:
    """The device, the number format and the size of the base, for summary.json."""
    base = [p for name, p in model.named_parameters() if "lora_" not in name]
    # A byte holds two 4-bit weights. The experts of a mixture-of-experts model stay in 16 bits,
    # because they are not modules of the class nn.Linear.
    in_4bit = sum(2 * p.numel() for p in base if p.dtype == torch.uint8)
    parameters = in_4bit + sum(p.numel() for p in base if p.dtype != torch.uint8)
    return {"device": str(model.device), "dtype": str(choose_dtype(model.device)),
            "load_in_4bit": in_4bit > 0, "share_in_4bit": round(in_4bit / parameters, 2),
            "parameters": parameters,
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def print_settings(model):
    """Prints what `settings` returns, in words."""
    chosen = settings(model)
    trained = chosen["trainable_parameters"]
    total = chosen["parameters"]
    print(f"device: {chosen['device']}, number format: {chosen['dtype'].removeprefix('torch.')}")
    print(f"trainable parameters: {trained:,} of {total / 1e6:,.1f} million "
          f"({trained / total:.2%})")
    if chosen["load_in_4bit"]:
        print(f"weights of the base in 4 bits: {chosen['share_in_4bit']:.0%}")


def save_model(model, tokenizer, folder):
    """Saves the tokenizer and the trained adapter, or all weights if all were trained."""
    is_full = causal_lm(model) is model
    options = {} if is_full else {"selected_adapters": ["default"], "save_embedding_layers": False}
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)


def write_card(folder, summary: dict):
    """Writes README.md, the model card of a finished run, in place of PEFT's empty template.

    `summary` is the content of summary.json.
    """
    base = base_of(summary["model"])
    card = Path(base, "README.md")
    if not Path(base).exists():
        card = Path(str(huggingface_hub.try_to_load_from_cache(base, "README.md")))
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    named = re.search("^license: *(.+)", text, re.MULTILINE)
    license_of_base = named[1] if named else None
    data = huggingface_hub.ModelCardData(
        base_model=base, library_name="peft", license=license_of_base, tags=[summary["method"]])
    lines = ["---", data.to_yaml(), "---", f"# {summary['method']} on {summary['model']}", "",
             f"- Base model: `{base}` (license: {license_of_base or 'unknown'})",
             f"- Data: `{summary['dataset']}`, {summary['step']} optimizer steps",
             f"- Command: `python {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`"]
    lines += [f"- {name} {version(name)}" for name in ("torch", "transformers", "peft")]
    lines += ["", "| held out | before | after |", "|---|---:|---:|"]
    lines += [f"| {name} | {summary['before'][name]:.4g} | {value:.4g} |"
              for name, value in summary["after"].items()]
    Path(folder, "README.md").write_text(visible("\n".join(lines)) + "\n", encoding="utf-8")


def copy_weights(saved: dict, weights: dict):
    """Copies saved weights, {name: tensor}, into the parameters of the same names."""
    for name in sorted({*saved, *weights}):
        fits = name in saved and name in weights and saved[name].shape == weights[name].shape
        need(fits, f"its weights are those of another model: {name} differs or is missing")
        need(saved[name].isfinite().all(), f"its weight {name} holds numbers that are not finite")
        weights[name].data.copy_(saved[name])


def peak_memory() -> float | None:
    """The peak memory of the process in GiB: of the GPU or, without one, of main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return None
    import resource  # does not exist on Windows
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def shown_text(tokenizer, ids: list[int]) -> str:
    """Token ids as text for the terminal. Special tokens stay, to show roles and ends of turns."""
    return visible(tokenizer.decode(ids))


def show(tokenizer, input_ids: list[int], loss_mask: list[int], heading: str):
    """Prints an example as the model sees it, in green where the mask is 1."""
    print(heading)
    for trained, group in itertools.groupby(zip(input_ids, loss_mask, strict=True), lambda x: x[1]):
        text = shown_text(tokenizer, [token for token, _ in group])
        print(f"\033[32m{text}\033[0m" if trained else text, end="")
    print()


# ---- tokenizers ----------------------------------------------------------------------------------

# A template around another: it renders with the original, splits the text at the headers of the
# assistant, and replaces the first end of turn after each header with eos, so that
# "<user>Hi<end><assistant>Hello<end>" becomes "<user>Hi<end><assistant>Hello<eos>".
ENDS_WITH_EOS = """\
{%- set chat %}TEMPLATE{%- endset %}
{%- for part in chat.split(HEADER) %}
{{- part if loop.first else HEADER + part.replace(END_TOKEN, eos_token, 1) }}
{%- endfor %}"""


def load_tokenizer(name: str, chat_template: str | None = None, arguments: dict | None = None):
    """Loads a model's tokenizer, with a pad token and an end of turn that the model can produce.

    `chat_template` names a file that replaces the model's template; `arguments` are variables that
    the template reads, such as {"enable_thinking": false}. Both become part of the template that
    is saved, so that a saved run gives the same tokens wherever it is loaded.

    The template of a base model such as Qwen2.5-0.5B ends turns with <|im_end|>, a token that the
    model was never trained on. LoRA cannot teach the model to produce it, because the head stays
    frozen. For such a model, eos ends the assistant's turns instead.
    """
    with phase(f"loading the tokenizer of {name}"):
        config = load_config(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(find(name), trust_remote_code=False)
        try:
            generation_config = transformers.GenerationConfig.from_pretrained(base_of(name))
        except OSError:  # the file is optional
            generation_config = transformers.GenerationConfig.from_model_config(config)
        longest = getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
        need(tokenizer.eos_token_id is not None, "it has no eos token to end an answer")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token  # masks come from lengths, never from pad ids
        spoken = [i for i, token in tokenizer.added_tokens_decoder.items() if not token.special]
        highest = max(tokenizer.vocab_size - 1, tokenizer.eos_token_id, *spoken)
        need(highest < config.get_text_config().vocab_size,
             f"its ids go up to {highest}, beyond the model's embeddings")
        if chat_template:
            tokenizer.chat_template = Path(find(chat_template)).read_text(encoding="utf-8")
        for key, value in (arguments or {}).items():
            tokenizer.chat_template = f"{{%- set {key} = {value!r} %}}{tokenizer.chat_template}"
        if "strftime_now" in (tokenizer.chat_template or ""):
            # Otherwise, token ids would change with the date, and so would a run that is resumed.
            date = "{%- macro strftime_now(format) %}01 Jan 2025{% endmacro -%}"
            tokenizer.chat_template = date + tokenizer.chat_template
        end = end_of_turn_id(tokenizer)
        if end not in (None, *stop_token_ids(tokenizer, generation_config, template=False)):
            end_answers_with_eos(tokenizer, tokenizer.convert_ids_to_tokens(end))
            print(visible(
                f"{name} was not trained to end a turn: answers end with {tokenizer.eos_token}"))
    return tokenizer


def end_answers_with_eos(tokenizer, end_token: str):
    """Wraps the chat template in ENDS_WITH_EOS, so that the assistant's turns end with eos."""
    question = [{"role": "user", "content": "Q"}]
    plain = tokenizer.apply_chat_template(question, tokenize=False)
    asked = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    template = ENDS_WITH_EOS.replace("HEADER", repr(asked.removeprefix(plain)))
    template = template.replace("END_TOKEN", repr(end_token))
    tokenizer.chat_template = template.replace("TEMPLATE", tokenizer.chat_template)


def end_of_turn_id(tokenizer) -> int | None:
    """The id of the special token that ends the assistant's turns in the chat template, or None."""
    if not tokenizer.chat_template:
        return None
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
    tail = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("ANSWER")[2]
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def stop_token_ids(tokenizer, generation_config, template: bool = True) -> list[int]:
    """All tokens that end an answer: eos, those of the generation config, the end of turn."""
    own = generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    if template:
        ids.add(end_of_turn_id(tokenizer))
    return sorted(ids - {None})


# ---- messages: one form that all templates understand --------------------------------------------

# Other names of roles; keys that are removed from a message or replaced by their standard form.
ROLES = {"developer": "system", "human": "user", "gpt": "assistant", "model": "assistant"}
NOT_FOR_TEMPLATES = ("from", "value", "weight", "train", "tool_calls")


def standard_message(message: dict) -> dict:
    """A message in the one form that every template understands, or ValueError.

    The content is a string, the arguments of a tool call are an object, and the role is system,
    user, assistant or tool. ShareGPT's `from` and `value` become `role` and `content`.
    """
    need(isinstance(message, dict) and "function_call" not in message,
         f"a message must be an object with role and content, not {message!r:.80}")
    role = message.get("role", message.get("from"))
    role = ROLES.get(str(role).lower(), role)
    content = message.get("content", message.get("value"))
    calls = [standard_call(call) for call in message.get("tool_calls") or []]
    need(role in ("system", "user", "assistant", "tool"),
         f"a message needs the role system, user, assistant or tool, not {role!r}")
    if isinstance(content, list):
        is_text = [isinstance(part, dict) and part.get("type") == "text" for part in content]
        need(all(is_text), f"a message has a part that is not text: {content!r:.80}")
        content = "".join(part["text"] for part in content)
    need(isinstance(content, str) or (content is None and calls),
         f"a message needs content, a string, or tool_calls, not {content!r:.80}")
    standard = {key: value for key, value in message.items() if key not in NOT_FOR_TEMPLATES}
    standard |= {"role": role, "content": content or ""}
    return standard | {"tool_calls": calls} if calls else standard


def standard_call(call: dict) -> dict:
    """A tool call whose arguments are an object. In OpenAI's form they are JSON in a string."""
    need(isinstance(call, dict), f"a tool call must be an object, not {call!r:.80}")
    function = call.get("function", call)
    need(isinstance(function, dict) and isinstance(function.get("name"), str),
         f"a tool call needs a function with a name, not {function!r:.80}")
    arguments = function.get("arguments") or {}
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    need(isinstance(arguments, dict),
         f"the arguments of a tool call must be an object, not {arguments!r:.80}")
    return call | {"type": "function", "function": function | {"arguments": arguments}}


def standard_tools(tools) -> list | None:
    """Tool schemas as a list, or None. A row holds one schema, a list, or either as JSON."""
    tools = json.loads(tools or "null") if isinstance(tools, str) else tools
    return [tools] if isinstance(tools, dict) else tools or None


def is_trained(message: dict) -> bool:
    """Whether to train on a turn of the assistant: not if its `weight` is 0 or `train` is false."""
    weight = message.get("weight", message.get("train", 1))
    need(weight in (0, 1), f"the weight of a message must be 0 or 1, not {weight!r}")
    return bool(weight)


# ---- chat templates: messages to text ------------------------------------------------------------

# A user could type <|im_end|> and then <|im_start|>assistant to forge a turn: this is a form of
# prompt injection. QUOTE breaks up everything in a message that spells a special token, before the
# template adds the real ones. `to_ids` splits the text at QUOTE and tokenizes the parts separately,
# so that they become plain characters. MARK marks text that is searched for after rendering. Both
# are noncharacters, which Unicode reserves for such internal use.
QUOTE = "\ufdd0"
MARK = "\ufdd1"


def quote(tokenizer, text: str) -> str:
    """The text with QUOTE after the first character of every special token that it spells."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    longest_first = sorted(special, key=len, reverse=True)

    def break_up(match):
        token = match[0]
        return token[0] + QUOTE + token[1:]

    return re.sub("|".join(map(re.escape, longest_first)), break_up, text)


def render(tokenizer, messages: list, tools=None, add_generation_prompt=False) -> str:
    """A conversation as a string, in which QUOTE breaks up special tokens that messages spell."""
    need(tokenizer.chat_template,
         "the model has no chat template for messages: --chat-template names one")
    messages = [standard_message(message) for message in messages]
    data = json.dumps([messages, standard_tools(tools)], ensure_ascii=False)
    messages, tools = json.loads(quote(tokenizer, data))
    return tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False)


def can_render(tokenizer, messages: list, tools) -> bool:
    """Whether the template accepts the messages. Some refuse a conversation without a question."""
    try:
        render(tokenizer, messages, tools)
    except jinja2.TemplateError:
        return False
    return True


def render_prompt(tokenizer, messages: list, tools=None) -> str:
    """The rendered conversation up to the point where the model continues.

    An assistant message at the end is a prefill, whose text the model continues. If both the
    generation prompt and the prefill open a thought, only the prefill's <think> stays.
    """
    *earlier, last = [standard_message(message) for message in messages]
    if last["role"] != "assistant":
        return render(tokenizer, messages, tools, add_generation_prompt=True)
    need("tool_calls" not in last, "a prompt cannot end in a tool call: its result is missing")
    asked = render(tokenizer, earlier, tools, add_generation_prompt=True)
    if "<think>" in last["content"] and asked.rstrip().endswith("<think>"):
        asked = asked.rstrip().removesuffix("<think>")
    return asked + quote(tokenizer, last["content"])


def render_header(tokenizer, chat: list, tools, answered: str) -> str:
    """The conversation up to the first character of its last message, an answer.

    Usually this is the generation prompt. There are two exceptions: a greeting has no question, so
    there is no prompt that asks for it; and DeepSeek-R1's generation prompt opens a thought, which
    the template removes from a finished turn. In these cases, the header is the text before an
    answer that consists of MARK. `answered` is the whole conversation, rendered.
    """
    *earlier, _ = chat
    marked = render(tokenizer, [*earlier, {"role": "assistant", "content": MARK}], tools)
    header = marked.partition(MARK)[0]
    asked = header
    if any(message["role"] != "system" for message in earlier):
        asked = render(tokenizer, earlier, tools, add_generation_prompt=True)
    if answered.startswith(asked):
        return asked
    need(answered.startswith(header) and asked.startswith(header),
         f"the chat template begins message {len(chat)} differently when it asks for it")
    return header


def check_printed(tokenizer, messages: list, tools=None):
    """Refuses a conversation if the template drops a message, a tool call or the tools.

    Everything that should be printed gets a mark of its own, which must be in the rendered text.
    """
    marked = [standard_message(message) for message in messages]
    names = []
    for place, message in enumerate(marked, 1):
        parts = [("content", message, "content")]
        parts += [("tool call", call["function"], "name") for call in message.get("tool_calls", [])]
        for kind, part, key in parts:
            if part[key].strip():
                part[key] += f"{MARK}{len(names)}{MARK}"
                names.append(f"the {kind} of message {place} ({message['role']})")
    text = render(tokenizer, marked, tools)
    lost = [name for i, name in enumerate(names) if f"{MARK}{i}{MARK}" not in text]
    if standard_tools(tools) and text == render(tokenizer, marked):
        lost.append("the tools")
    need(not lost, f"the chat template does not print {', '.join(lost)}")


def check_said(message: dict, place: int, printed: str):
    """Refuses an answer if the template does not print all of its content or its thought."""
    printed = "".join(printed.replace(QUOTE, "").split())
    for key in ("content", "reasoning_content", "reasoning", "thinking"):
        need("".join(str(message.get(key) or "").split()) in printed,
             f"the chat template does not print the {key} of message {place} whole")
    need(message["content"].strip() or message.get("tool_calls"),
         f"message {place}, an answer, is empty")


# ---- text to token ids ---------------------------------------------------------------------------

def to_ids(tokenizer, text: str) -> list[int]:
    """The token ids of a rendered conversation. Text that QUOTE breaks up is tokenized in parts."""
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in text.split(QUOTE)]
    return list(itertools.chain(*parts))


def text_ids(tokenizer, text: str) -> list[int]:
    """The token ids of a string: one BOS, even if the string spells one, and no added eos."""
    ids = tokenizer(text)["input_ids"]
    if ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    return ids[1:] if ids[:2] == [tokenizer.bos_token_id] * 2 else ids


def with_end(tokenizer, ids: list[int]) -> list[int]:
    """Appends eos, unless the ids end in a special token; cuts whitespace after that token."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.discard(tokenizer.unk_token_id)  # it stands for a character, and does not end a text
    special.add(tokenizer.eos_token_id)
    last = max((place for place, i in enumerate(ids) if i in special), default=0)
    if last > 0 and not tokenizer.decode(ids[last + 1:]).strip():
        return ids[:last + 1]
    return [*ids, tokenizer.eos_token_id]


def shared_length(a: list, b: list) -> int:
    """The length of the longest common prefix of two lists."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def encode_prompt(tokenizer, prompt: str | list, tools=None) -> list[int]:
    """The token ids up to the point where the model answers."""
    need(prompt and isinstance(prompt, str | list),
         "a prompt must be a string or a list of messages")
    if isinstance(prompt, str):
        return text_ids(tokenizer, prompt)
    check_printed(tokenizer, prompt, tools)
    return to_ids(tokenizer, render_prompt(tokenizer, prompt, tools))


def encode(tokenizer, prompt: str | list, answer: str | list, tools=None) -> list[list]:
    """Turns prompt and answer, strings or lists of messages, into examples, each a list of pieces.

    A conversation becomes one example, in which every turn of the assistant in `answer` is
    trained. If the template rewrites earlier turns once later ones follow (Qwen3 drops their
    thoughts), each turn becomes an example in which it is the last, as it is in sampling. If the
    prompt ends in a prefill, the answer continues it, and only the answer is trained.
    """
    if isinstance(prompt, str) and isinstance(answer, str):
        return [encode_text(tokenizer, prompt, answer)]
    if isinstance(prompt, list) and prompt and isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if isinstance(prompt, str) and prompt and isinstance(answer, list) and answer:
        if standard_message(answer[0])["role"] == "assistant":
            prompt = [{"role": "user", "content": prompt}]
    need(isinstance(prompt, list) and isinstance(answer, list),
         "prompt and answer must be strings or lists of messages")
    first = len(prompt)
    chat = [standard_message(message) for message in prompt + answer]
    turns = [first + i for i, message in enumerate(answer)
             if chat[first + i]["role"] == "assistant" and is_trained(message)]
    need(turns, "there is no assistant message to train on")
    prefilled = {}  # {turn: its rendered prompt, if that ends in a prefill}
    if first and chat[first - 1]["role"] == "assistant" and turns[0] == first:
        prefilled[first - 1] = render_prompt(tokenizer, chat[:first], tools)
        prefill = chat.pop(first - 1)
        content = prefill["content"] + chat[first - 1]["content"]
        chat[first - 1] = prefill | chat[first - 1] | {"content": content}
        turns = [turn - 1 for turn in turns]
    examples = []
    done = []
    for turn in turns:
        is_greeting = all(message["role"] == "system" for message in chat[:turn])
        if is_greeting and not can_render(tokenizer, chat[:turn + 1], tools):
            continue
        asked, said = encode_turn(tokenizer, chat[:turn + 1], tools, prefilled.get(turn))
        if examples and asked[:len(done)] == done:
            examples[-1].append((asked[len(done):], False))
        else:
            head = head_length(tokenizer, chat[:turn + 1], tools, asked)
            examples.append([(asked[:head], False), (asked[head:], False)])
        examples[-1].append((said, True))
        done = asked + said
    need(examples, "the only answer has no question, and the template cannot render it alone")
    return examples


def encode_text(tokenizer, prompt: str, answer: str) -> list[tuple[list[int], bool]]:
    """Turns prompt and answer, two strings, into pieces. One token ends the answer."""
    # They are tokenized as one string, because many tokenizers treat the start of a string
    # specially. A token that spans the border between prompt and answer belongs to the answer.
    ids = with_end(tokenizer, text_ids(tokenizer, prompt + answer))
    head = int(ids[0] == tokenizer.bos_token_id)
    border = max(head, shared_length(text_ids(tokenizer, prompt), ids) if prompt else 0)
    need(answer.strip() and border < len(ids), "the answer is empty")
    return [(ids[:head], False), (ids[head:border], False), (ids[border:], True)]


def encode_turn(tokenizer, chat: list, tools, prefilled: str | None) -> tuple[list, list]:
    """The ids before the last message, an answer, and the ids of the answer with its end of turn.

    `prefilled` is the rendered prompt if it ends in a prefill, the beginning of the last message.
    """
    check_printed(tokenizer, chat, tools)
    text = render(tokenizer, chat, tools)
    header = render_header(tokenizer, chat, tools, text)
    check_said(chat[-1], len(chat), text[len(header):])
    header = prefilled or header
    need(text.startswith(header), "the chat template does not print the prefill as it is")
    ids = to_ids(tokenizer, text)
    # A token may span the newlines that end the header and those that begin the answer. Such a
    # token belongs to the answer.
    start = shared_length(to_ids(tokenizer, header), ids)
    ends = (tokenizer.eos_token_id, end_of_turn_id(tokenizer))
    stops = [i for i in range(start, len(ids)) if ids[i] in ends]
    if stops:
        ids = ids[:stops[0] + 1]
    else:
        ids = with_end(tokenizer, ids)  # GLM-4's template has no end of turn
    return ids[:start], ids[start:]


def head_length(tokenizer, chat: list, tools, asked: list[int]) -> int:
    """The number of tokens before the first question: BOS and the system message."""
    first = next(i for i, message in enumerate(chat) if message["role"] != "system")
    other = [*chat[:first], chat[first] | {"content": MARK}, *chat[first + 1:]]
    return shared_length(asked, to_ids(tokenizer, render(tokenizer, other, tools)))


def encode_preference(tokenizer, row: dict) -> tuple[list, list]:
    """Turns a row into two lists of pieces, for the chosen and the rejected answer to one prompt.

    The prompt is a column or, without such a column, the common start of both answers.
    """
    for name in ("chosen", "rejected"):
        need(row.get(name), f"the column {name} is missing or empty")
    prompt = prompt_of(row, tokenizer)
    answers = [row["chosen"], row["rejected"]]
    need(answers[0] != answers[1], "chosen and rejected are the same")
    if all(isinstance(answer, list) for answer in answers):
        # An answer that begins with a question is a whole conversation, as in UltraFeedback.
        answers = [with_system(answer, row) if standard_message(answer[0])["role"] == "user"
                   else answer for answer in answers]
        shared = answers[0][:shared_length(*answers)]
        if any(standard_message(message)["role"] == "user" for message in shared):
            prompt = shared
        need(prompt, "there is no prompt: no column holds one, and the answers share no question")
        if isinstance(prompt, list):
            length = len(prompt)
            answers = [x[length:] if x[:length] == prompt else x for x in answers]
    others = [name for name, value in row.items() if name not in ("chosen", "rejected")
              and isinstance(value, str) and " " in value.strip()]
    # Otherwise, the common start of both answers would be taken for the question.
    if not prompt and others:
        raise ValueError(f"there is no column prompt; if {others[0]} holds the prompt, add "
                         f"--columns prompt={others[0]}, otherwise remove {others[0]}")
    sides = [encode(tokenizer, prompt, answer, row.get("tools")) for answer in answers]
    need(len(sides[0]) == len(sides[1]) == 1,
         "the chat template rewrites turns of the answer once later ones follow")
    chosen, rejected = [examples[0] for examples in sides]
    if not prompt:
        # The prompt ends between two tokens, because half a word is not tokenized like the word.
        head, _, (chosen_ids, _) = chosen
        _, _, (rejected_ids, _) = rejected
        border = shared_length(chosen_ids, rejected_ids)
        chosen, rejected = [[head, (ids[:border], False), (ids[border:], True)]
                            for ids in (chosen_ids, rejected_ids)]
    prompts = [side[0][0] + side[1][0] for side in (chosen, rejected)]
    # One prompt may be longer, if in the other a token spans the border and belongs to the answer.
    need(0 < shared_length(*prompts) == min(map(len, prompts)) and chosen[2][0],
         "chosen and rejected do not answer the same prompt")
    need(chosen != rejected, "chosen and rejected have the same tokens")
    return chosen, rejected


# ---- rows ----------------------------------------------------------------------------------------

FORMATS = (".json", ".jsonl", ".csv", ".tsv")
# The usual names of columns. The first one that a row has is used.
QUESTIONS = ("prompt", "instruction", "question", "problem", "query", "input")
ANSWERS = ("completion", "output", "response", "solution", "answer")
# Columns that look like part of a conversation. The report names those that are not used.
SPOKEN = {*QUESTIONS, *ANSWERS, "system", "system_prompt", "context", "messages", "conversations",
          "history", "text", "chosen", "rejected", "completions", "labels"}


def read_file(path: Path) -> list:
    """The rows of a local file: .parquet; or .json, .jsonl, .csv or .tsv, perhaps followed by .gz.

    Every value in a .csv or .tsv file is read as a string, so "0123" and "None" stay as they are.
    """
    is_zipped = path.suffix == ".gz"
    kind = Path(path.stem).suffix.lower() if is_zipped else path.suffix.lower()
    if kind == ".parquet":
        return parquet.read_table(path).to_pylist()
    need(kind in FORMATS, f"its name must end in {', '.join(FORMATS)} or .parquet")
    opener = gzip.open if is_zipped else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        if kind in (".csv", ".tsv"):
            csv.field_size_limit(2**31 - 1)
            rows = list(csv.DictReader(file, delimiter="," if kind == ".csv" else "\t"))
            for place, row in enumerate(rows, 1):
                # An unquoted comma would shift values into the wrong column.
                need(None not in row and None not in row.values(),
                     f"row {place} does not have as many cells as the header: {row}")
            return rows
        text = file.read().strip()
    if not text.startswith("["):  # one object per line
        text = "[" + ",\n".join(line for line in text.splitlines() if line.strip()) + "]"
    return json.loads(text)


def load_rows(source: str, split: str, limit: int, seed: int, columns=()) -> list[dict]:
    """All rows of a file, or up to `limit` random rows of a Hub dataset, NAME or NAME:CONFIG.

    `columns` renames columns: with "prompt=query", the column `query` is read as the prompt.
    """
    with phase(f"reading {source}"):
        path = Path(find(source))
        if path.is_file() or path.suffix.lower() in (*FORMATS, ".parquet", ".gz"):
            rows = read_file(path)
        else:
            patch_libraries()
            name, _, config = source.partition(":")
            rows = datasets.load_dataset(name, config or None, split=split).shuffle(seed=seed)
            rows = rows.select(range(min(limit, len(rows))))
        need(all(isinstance(row, dict) for row in rows),
             "a row is not an object that maps names of columns to values")
        rows = [without_nones(row) for row in rows]
        names = {}
        for pair in columns:
            new, _, old = pair.partition("=")
            need(any(old in row for row in rows), f"there is no column {old} for --columns {pair}")
            names[old] = new
        # A renamed column replaces one that already has the new name.
        return [{names.get(key, key): value for key, value in row.items()
                 if key in names or key not in names.values()} for row in rows]


def without_nones(value):
    """Drops keys whose value is None. `datasets` adds them, but templates test if a key exists."""
    if isinstance(value, dict):
        return {key: without_nones(item) for key, item in value.items() if item is not None}
    return [without_nones(item) for item in value] if isinstance(value, list) else value


def from_cell(name: str, value):
    """Converts a value of a conversation column: an int to a string, JSON of messages to a list."""
    if type(value) is int and name in SPOKEN:
        return str(value)
    if isinstance(value, str) and name in SPOKEN and value.strip()[:1] + value.strip()[-1:] == "[]":
        with contextlib.suppress(json.JSONDecodeError):  # ordinary text in brackets
            items = json.loads(value)
            if name in ("completions", "labels") or all(isinstance(x, dict) for x in items):
                return items
    return value


def with_system(messages: list, row: dict) -> list:
    """The messages, after the row's column `system` unless they hold a system message already."""
    system = row.get("system") or row.get("system_prompt")
    if not system or any(standard_message(message)["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": system}, *messages]


def prompt_of(row: dict, tokenizer) -> str | list:
    """The prompt of a row, a string or a list of messages; "" if it has none.

    A question under another name than `prompt`, or with a `system` column, becomes messages if the
    tokenizer has a template for them.
    """
    name = next((name for name in QUESTIONS if row.get(name)), None)
    prompt = row.get(name, "")
    system = row.get("system") or row.get("system_prompt")
    if isinstance(prompt, list):
        return with_system(prompt, row)
    if not prompt or (name == "prompt" and not system):
        return prompt
    parts = [prompt]
    if name == "instruction":
        parts += [row[part] for part in ("input", "context") if row.get(part)]
    if tokenizer.chat_template:
        return with_system([{"role": "user", "content": "\n\n".join(parts)}], row)
    return "\n\n".join([*([system] if system else []), *parts, ""])


def answer_of(row: dict):
    """The answer of a row under the first of its usual names, or None."""
    return next((row[name] for name in ANSWERS if row.get(name)), None)


def unused_columns(row: dict, made, make, *options) -> list[str]:
    """The columns that look like part of the conversation but that `make` does not use."""
    unused = []
    for name in sorted(SPOKEN & row.keys()):
        try:
            other = make({key: value for key, value in row.items() if key != name}, *options)
        except Exception:  # the row cannot do without this column
            continue
        if row[name] and other == made:
            unused.append(name)
    return unused


def encode_rows(source: str, rows: list[dict], make, tokenizer, max_length: int) -> list[dict]:
    """The examples that `make` builds from the rows: one, or a list of several, per row.

    It reports rows that cannot be used, truncated examples, and columns that are not used.
    """
    max_length = min(max_length, tokenizer.model_max_length)
    encoded = []
    refused = []
    unused = None
    for place, row in enumerate(rows, 1):
        try:
            row = {key: from_cell(key, value) for key, value in row.items()}
            made = make(row, tokenizer, max_length)
        except NameError:  # a bug
            raise
        except Exception as error:  # templates and tokenizers raise exceptions of any type
            print_traceback()
            refused.append(f"row {place}: {error}")
            continue
        encoded.append(made if isinstance(made, list) else [made])
        if unused is None:
            unused = unused_columns(row, made, make, tokenizer, max_length)
    examples = list(itertools.chain(*encoded))
    numbers = {"rows became one example per answer": sum(len(several) > 1 for several in encoded),
               "are truncated": sum(example.get("truncated", False) for example in examples)}
    report = f"{source}: {len(rows)} rows, {len(examples)} examples"
    report += "".join(f"; {number} {words}" for words, number in numbers.items() if number)
    if unused:
        report += f"; columns not used: {', '.join(unused)}"
    if refused:
        report += f"; {len(refused)} rows cannot be used, the first is {refused[0]}"
    if not examples:
        fail(f"{report}; columns: {', '.join(rows[0]) if rows else 'none'}")
    print(f"{visible(report):.500}")
    return examples


def load_examples(args, make, tokenizer, limit: int) -> tuple[list[dict], list[dict]]:
    """Training and held-out examples. Without --eval-dataset, up to a fifth is held out.

    In that case, no prompt is in both parts. If examples have a "key", it is compared instead.
    """
    if os.path.realpath(args.dataset) == os.path.realpath(args.eval_dataset or ""):
        fail(f"--eval-dataset {args.dataset} is trained on: without it, some rows are held out")
    rows = load_rows(args.dataset, args.split, limit + args.eval_size, args.seed, args.columns)
    examples = encode_rows(args.dataset, rows, make, tokenizer, args.max_length)
    if args.eval_dataset:
        rows = load_rows(args.eval_dataset, args.split, args.eval_size, args.seed, args.columns)
        rows = rows[:args.eval_size]
        return examples, encode_rows(args.eval_dataset, rows, make, tokenizer, args.max_length)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(args.seed))
    held_out = [examples[i] for i in order[:min(args.eval_size, len(examples) // 5)]]
    keys = {tuple(example.get("key", example["prompt"])) for example in held_out}
    training = [x for x in examples if tuple(x.get("key", x["prompt"])) not in keys]
    if not training or not held_out:
        fail("too few different prompts to hold some out: add rows, or name an --eval-dataset")
    left_out = len(examples) - len(training) - len(held_out)
    print(f"{len(training)} to train on, {len(held_out)} held out; "
          f"{left_out} left out, because a held-out row has the same prompt")
    return training, held_out
