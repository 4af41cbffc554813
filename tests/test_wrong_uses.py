"""What a user gets wrong is answered by one line with the remedy, soon, and before anything is trained or written."""

import shutil

import pytest

from jaxpost import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    LoraConfig,
    SFTConfig,
    SFTTrainer,
    from_pretrained,
    generate,
    save_pretrained,
    score,
)
from jaxpost.cli import main
from jaxpost.errors import ConfigError, DataError
from tests.conftest import make_model, make_tokenizer

FILES = {
    "text.jsonl": '{"text": "one two three"}\n' * 4,
    "pairs.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 4,
    "prompts.jsonl": '{"prompt": "a"}\n' * 4,
    "labelled.jsonl": '{"prompt": "a", "completion": "b", "label": true}\n' * 4,
    "empty.json": "[]",
    "words.jsonl": "hello world\n",
    "binary.jsonl": bytes(range(256)) * 9,
    "broken.parquet": "no parquet" * 9,
    "notes.txt": "a text",
    "taken": "a file where a folder should be",
    "broken.gguf": "GGUF and no more",
    "rewards.py": "def right(completions, **_):\n    return [1.0] * len(completions)\n",
    "syntax.py": "def right(:\n",
    "missing.py": "import nowhere_to_be_found\n",
    "number.py": "right = 3\n",
    "twice.yaml": "learning_rate: 1\nlearning_rate: 2\n",
    "tab.yaml": "lora_target_modules:\n\t- q_proj\n",
    "list.yaml": "- learning_rate\n",
    "binary.yaml": bytes(range(256)),
    "unknown.yaml": "lora_rank: 8\n",
    "dashes.yaml": "--learning_rate: 1e-4\n",
    "folder/notes.txt": "no model, no data and no run",
}
DAMAGED = {
    "weightless": lambda folder: (folder / "model.safetensors").unlink(),
    "pickled": lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
    "cut": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:5000]
    ),
    "hollow": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "configless": lambda folder: (folder / "config.json").unlink(),
    "misconfigured": lambda folder: (folder / "config.json").write_text("{nope"),
}


@pytest.fixture(scope="module")
def place(tiny_folder, tmp_path_factory):
    """A folder with models and data, right and wrong ones."""
    folder = tmp_path_factory.mktemp("wrong")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    shutil.copytree(tiny_folder, folder / "model")
    save_pretrained(make_model(head="reward"), make_tokenizer(), folder / "judge")
    for name, damage in DAMAGED.items():
        damage(shutil.copytree(tiny_folder, folder / name))
    return folder


@pytest.fixture(autouse=True)
def nothing_written(place, monkeypatch):
    """Each runs in that folder and leaves it as it is."""
    monkeypatch.chdir(place)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    yield
    folders = {path for path in place.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {place / name for name in ("model", "judge", "folder", *DAMAGED)}
    after = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    assert before == {path: time for path, time in after.items() if "__pycache__" not in path.parts}


RUN = "--model_name_or_path model --output_dir out --dataset_name"
SFT, DPO = f"sft {RUN} text.jsonl", f"dpo {RUN} pairs.jsonl"
ONLINE = f"{RUN} prompts.jsonl --max_completion_length 8 --reward_funcs"
GRPO = f"grpo {ONLINE} rewards.py:right"
GENERATE = "generate --model_name_or_path model --dataset_name prompts.jsonl --max_new_tokens 8"
EVALUATE = "evaluate --model_name_or_path model --dataset_name prompts.jsonl --max_new_tokens 8"
OF = "sft --output_dir out --dataset_name text.jsonl --model_name_or_path"

# Words of the command line -> exit code and what the line says, the remedy last.
WRONG = {
    "tran": (2, "unknown command 'tran'; known: sft, dpo"),
    "--model_name_or_path model": (2, "unknown command '--model_name_or_path'; known: sft, dpo"),
    "evaluate dpoo --model_name_or_path model": (2, "did you mean 'dpo'"),
    "preview dpoo": (2, "did you mean 'dpo'"),
    "plan": (2, "it takes one of: sft, dpo"),
    "completion powershell": (2, "it takes one of: bash, zsh, fish"),
    "sft model text.jsonl": (2, "'model' belongs to no flag; a value stands behind one"),
    # Flags and their values.
    f"{SFT} --lr 1e-4": (2, "did you mean '--learning_rate'"),
    f"{SFT} --batch_size 4": (2, "did you mean '--per_device_train_batch_size'"),
    f"{SFT} -max_steps 3": (2, "did you mean '--max_steps'"),
    f"{SFT} --learning_rate fast": (2, "--learning_rate: invalid float value: 'fast'"),
    f"{SFT} --learning_rate": (2, "--learning_rate: it needs a value"),
    f"{SFT} --packing maybe": (2, "--packing: Truthy value expected", "one of yes/no, true/false"),
    f"{SFT} --optim adamv": (2, "did you mean 'adamw'"),
    f"{SFT} --phase_timeouts 5": (2, "--phase_timeouts: '5' is no JSON object, such as"),
    f"{SFT} --max_length 0": (2, "max_length is 0; a row needs at least 2 tokens"),
    f"{SFT} --per_device_eval_batch_size 0": (2, "per_device_eval_batch_size is 0; it must be at least 1"),
    f"{SFT} --gradient_accumulation_steps 0": (2, "it must be at least 1"),
    f"{SFT} --num_train_epochs 0": (2, "it must be above 0"),
    f"{SFT} --seed -1": (2, "seed is -1; it must be at least 0"),
    f"{DPO} --beta -0.1": (2, "beta is -0.1; it must be above 0"),
    f"{GRPO} --num_generations 1": (2, "num_generations is 1; it must be at least 2"),
    f"{GRPO} --num_generations 3": (2, "must be a multiple of num_generations, 3: change per_device_train_batch_size"),
    f"{GRPO} --temperature 0": (2, "it must be above 0 to learn from what is sampled"),
    # Flags that do not go together, or not with this.
    f"{DPO} --packing": (2, "--packing is a flag of sft, not of dpo; leave it out"),
    f"{DPO} --num_generations 4": (2, "is a flag of grpo, rloo, ppo, not of dpo; leave it out"),
    f"{DPO} --sync_ref_model --precompute_ref_log_probs": (2, "drop one"),
    f"{DPO} --loss_weights 1 2": (2, "loss_weights has 2 numbers for 1 of loss_type; give as many"),
    f"{SFT} --load_in_4bit": (2, "add --use_peft"),
    f"{SFT} --load_in_4bit --load_in_8bit --use_peft": (2, "remove one of them"),
    f"{SFT} --packing --max_length null": (2, "give --max_length"),
    f"{SFT} --warmup_steps 5 --warmup_ratio 0.1": (2, "remove one of them"),
    f"{SFT} --use_peft --lora_target_modules q_prj": (2, "nothing in the model matches 'q_prj'; it has", "q_proj"),
    f"{SFT} --load_best_model_at_end": (2, "give both the same"),
    f"{SFT} --num_processes 2": (2, "give all three or none"),
    f"{SFT} --dataset_config main": (3, "leave dataset_config out"),
    # Meshes.
    f"{SFT} --mesh data=3": (2, "needs 3 devices, here are 8"),
    f"{SFT} --mesh fdsp=8": (2, "did you mean 'fsdp'"),
    f"{SFT} --mesh fsdp=-2": (2, "must be a positive number or -1"),
    f"{SFT} --mesh 8": (2, "axes are data, fsdp"),
    # Folders and files to write.
    f"{SFT} --output_dir taken": (2, "taken is a file; give a folder"),
    f"{SFT} --output_dir /proc/out": (2, "cannot be written", "choose another"),
    f"{SFT} --checkpoint_dir taken": (2, "checkpoint_dir taken is a file; give a folder"),
    f"{SFT} --compilation_cache_dir taken": (2, "compilation_cache_dir taken is a file; give a folder"),
    f"{SFT} --tokenized_cache_dir taken": (78, "give another --tokenized_cache_dir"),
    f"{SFT} --resume_from_checkpoint 400": (2, "holds no checkpoint; leave it out"),
    f"{SFT} --push_to_hub": (78, "on the Hub cannot be made", "name it with --hub_model_id"),
    f"{SFT} --push_to_hub --hub_model_id a/b/c": (2, "give owner/name"),
    f"{GENERATE} --output_file folder": (2, "folder is a folder; name a file in it"),
    # Files of flags.
    f"{SFT} --config": (2, "--config needs a file"),
    f"{SFT} --config twice.yaml": (2, "line 2: 'learning_rate' is given twice"),
    f"{SFT} --config tab.yaml": (2, "not valid YAML", "indent with spaces"),
    f"{SFT} --config list.yaml": (2, "expected a mapping of flags to values, such as"),
    f"{SFT} --config binary.yaml": (2, "not valid YAML"),
    f"{SFT} --config unknown.yaml": (2, "line 1: unknown key 'lora_rank' (did you mean 'lora_r'?)"),
    f"{SFT} --config dashes.yaml": (2, "did you mean 'learning_rate'"),
    f"{SFT} --config folder": (2, "Is a directory"),
    # Models.
    f"{OF} text.jsonl": (2, "text.jsonl is a file; give the folder"),
    f"{OF} folder": (2, "no config.json; a model folder holds"),
    f"{OF} weightless": (2, "no model.safetensors", "download the model again"),
    f"{OF} pickled": (2, "never opened; convert them"),
    f"{OF} cut": (2, "it is incomplete); download or convert it again"),
    f"{OF} hollow": (2, "download or convert it again"),
    f"{OF} configless": (2, "no config.json; a model folder holds"),
    f"{OF} misconfigured": (2, "misconfigured/config.json: not readable JSON"),
    f"{OF} broken.gguf": (2, "download or convert it again"),
    f"{OF} judge": (2, "is a reward model", "give a language model"),
    f"{SFT} --chat_template_path notes.txt": (2, "they end in .jinja"),
    # Data.
    f"sft {RUN} nowhere.jsonl": (3, "nowhere.jsonl: no such file or folder"),
    f"sft {RUN} empty.json": (3, "empty.json has no rows"),
    f"sft {RUN} words.jsonl": (3, "words.jsonl, line 1, column 1: not valid JSON"),
    f"sft {RUN} binary.jsonl": (3, "line 1, column 1: not valid JSON"),
    f"sft {RUN} broken.parquet": (3, "not a readable parquet file"),
    f"sft {RUN} notes.txt": (3, "give one that ends in .json, .jsonl, .parquet"),
    f"sft {RUN} folder": (3, "has no .json, .jsonl, .parquet"),
    f"sft {RUN} pairs.jsonl": (3, "no column 'completion' to train on", "found prompt, chosen, rejected"),
    f"dpo {RUN} text.jsonl": (3, "has the columns text; accepted are 'chosen' with 'rejected'"),
    f"kto {RUN} prompts.jsonl": (3, "accepted are", "'prompt' with 'completion' with 'label'"),
    f"reward {RUN} labelled.jsonl": (3, "accepted are 'chosen' with 'rejected'"),
    f"grpo {RUN} text.jsonl --max_completion_length 8": (3, "no column 'prompt'; columns: text"),
    f"{SFT} --dataset_train_split trian": (3, "did you mean 'train'"),
    f"{SFT} --test_split_size 100": (2, "takes 100 of the 4 rows; both parts need rows"),
    # Rewards.
    f"grpo {ONLINE} nowhere.py:right": (2, "there is no file nowhere.py; give file.py:function"),
    f"grpo {ONLINE} rewards.py": (2, "no function 'rewards.py'; give file.py:function"),
    f"grpo {ONLINE} rewards.py:wrong": (2, "wrong cannot be loaded", "has no attribute 'wrong'"),
    f"grpo {ONLINE} syntax.py:right": (2, "right cannot be loaded (SyntaxError", "line 1"),
    f"grpo {ONLINE} missing.py:right": (2, "right cannot be loaded", "No module named 'nowhere_to_be_found'"),
    f"grpo {ONLINE} number.py:right": (2, "right cannot be loaded", "right is int, no function"),
    f"grpo {ONLINE} numeric_anser": (2, "did you mean 'numeric_answer'"),
    f"grpo {ONLINE} model": (2, "no trained reward head; train one with jaxpost reward"),
    f"ppo {ONLINE} rewards.py:right --reward_model_path model": (2, "train one with jaxpost reward"),
    f"grpo {RUN} prompts.jsonl --max_completion_length 8": (2, "give --reward_funcs"),
    f"grpo {RUN} prompts.jsonl --max_completion_length 512": (2, "the model reads 256 tokens", "lower it"),
    # The other commands.
    "chat": (2, "chat needs --model_name_or_path"),
    "chat --model_name_or_path judge --max_new_tokens 8": (2, "is a reward model", "give a language model"),
    "chat --model_name_or_path model --max_new_tokens 512": (2, "the model reads 256 tokens", "lower it"),
    f"{GENERATE} --max_new_tokens 512": (2, "the model reads 256 tokens", "lower it"),
    f"{GENERATE} --top_p 2": (2, "it must be above 0 and at most 1"),
    f"{EVALUATE} --judge model --against model": (2, "no trained reward head; train one with jaxpost reward"),
    f"{EVALUATE} --judge judge": (2, "give either --against MODEL or --against_file FILE"),
    f"{EVALUATE} --judge judge --against_file pairs.jsonl": (3, "no column 'completion'"),
    f"{EVALUATE} --judge judge --reward_funcs numeric_answer": (2, "give one of them"),
    f"{EVALUATE} --reward_funcs numeric_answer --output_file folder": (2, "name a file in it"),
    "evaluate grpo --model_name_or_path model": (2, "grpo is measured in a run"),
    "export --model_name_or_path folder --output_dir out": (2, "no config.json; a model folder holds"),
    "export --model_name_or_path judge --output_dir out": (2, "is a reward model"),
    "export --model_name_or_path model --output_dir out --head reward": (2, "train one with jaxpost reward"),
    "export --model_name_or_path model --output_dir out --merge_adapter false": (2, "no adapter to save"),
    "export --model_name_or_path model --output_dir model": (2, "is the folder of the model itself; give another"),
    "export --model_name_or_path model --output_dir out --max_shard_size big": (2, "a size such as 5GB"),
    "plan sft --model_name_or_path model": (2, "give --topology"),
    "plan sft --model_name_or_path model --topology v5x:4x4": (2, "did you mean 'v5p'"),
    "report": (2, "jaxpost report RUN"),
    "report model": (2, "is no run", "give the output_dir of a run"),
    "report nowhere": (2, "is no folder; give the output_dir of a run"),
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_command_is_one_line_with_the_remedy(words, capsys):
    code, *said = WRONG[words]
    assert main(words.split()) == code
    error = capsys.readouterr().err
    assert error.startswith("jaxpost: ") and error.count("\n") == 1
    assert all(part in error for part in said), error


ROWS = [{"text": "one two three"}] * 4
HERE = {"output_dir": "out", "report_to": "none"}


def sft(train_dataset=ROWS, args=None, **options):
    return SFTTrainer(options.pop("model", "model"), args or SFTConfig(**HERE), train_dataset=train_dataset, **options)


def grpo(reward_funcs):
    args, rows = GRPOConfig(**HERE, max_completion_length=8), [{"prompt": "a"}] * 4
    return GRPOTrainer("model", reward_funcs=reward_funcs, args=args, train_dataset=rows)


# In Python: what is called -> its error and what that says.
WRONG_CALLS = {
    "field": (lambda: SFTConfig(learning_rte=1), ConfigError, "did you mean 'learning_rate'"),
    "switch": (lambda: SFTConfig(packing="yes"), ConfigError, "packing is 'yes'; give True or False"),
    "part": (lambda: SFTConfig(per_device_train_batch_size=2.5), ConfigError, "is 2.5; give a whole number"),
    "rate": (lambda: SFTConfig(learning_rate="fast"), ConfigError, "it takes a finite number"),
    "config": (lambda: sft(args=DPOConfig(**HERE)), ConfigError, "give a jaxpost.SFTConfig"),
    "mapping": (lambda: sft(args=HERE), ConfigError, "give a jaxpost.SFTConfig"),
    "rows third": (lambda: SFTTrainer("model", SFTConfig(**HERE), ROWS), ConfigError, "data_collator is not there"),
    "no rows": (lambda: sft([]), DataError, "has no rows"),
    "path": (lambda: sft("text.jsonl"), DataError, "is a str; give a list of dicts"),
    "texts": (lambda: sft(["a", "b"]), DataError, "a row must be an object with columns"),
    "generator": (lambda: sft(row for row in ROWS), DataError, "give the function that makes it, or a list"),
    "columns": (lambda: DPOTrainer("model", args=DPOConfig(**HERE), train_dataset=ROWS), DataError, "'chosen' with"),
    "tokenizer": (lambda: sft(processing_class="model"), ConfigError, "give AutoTokenizer.from_pretrained"),
    "no tokenizer": (lambda: sft(model=from_pretrained("model")), ConfigError, "give processing_class"),
    "callback": (lambda: sft(callbacks=3), ConfigError, "callbacks is int; give a list"),
    "callbacks": (lambda: sft(callbacks=[3]), ConfigError, "derive it from TrainerCallback"),
    "rank": (lambda: LoraConfig(r=0), ConfigError, "it takes a positive whole number"),
    "reward": (lambda: grpo(3), ConfigError, "3 is no function; give functions"),
    "rewards": (lambda: grpo([3]), ConfigError, "3 is no function; give functions"),
    "no reward": (lambda: grpo(None), ConfigError, "give --reward_funcs"),
    "resume": (lambda: sft().train(resume_from_checkpoint=400), ConfigError, "leave it out to begin anew"),
    "head": (lambda: from_pretrained("model", head="lmm"), ConfigError, "did you mean 'lm'"),
    "quantization": (lambda: from_pretrained("model", quantization="nf5"), ConfigError, "did you mean 'nf4'"),
    "judge speaks": (
        lambda: generate(from_pretrained("judge", head="reward"), make_tokenizer(), ["x"]),
        ConfigError,
        "needs a language model",
    ),
    "one text": (lambda: generate(from_pretrained("model"), make_tokenizer(), "x"), ConfigError, "a list of texts"),
    "option": (
        lambda: generate(from_pretrained("model"), make_tokenizer(), ["x"], max_tokens=3),
        ConfigError,
        "did you mean 'max_new_tokens'",
    ),
    "no prompts": (
        lambda: generate(from_pretrained("model"), make_tokenizer(), [], max_new_tokens=3),
        DataError,
        "no rows",
    ),
    "long prompt": (
        lambda: generate(from_pretrained("model"), make_tokenizer(), ["x " * 9999], max_new_tokens=3),
        DataError,
        "lower max_new_tokens",
    ),
    "no score": (lambda: score(from_pretrained("model"), make_tokenizer(), ROWS), ConfigError, 'head="reward"'),
    "saved": (lambda: save_pretrained(make_model(), make_tokenizer(), "taken"), ConfigError, "give a folder"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_wrong_call_is_one_line_with_the_remedy(name):
    call, kind, said = WRONG_CALLS[name]
    with pytest.raises(kind) as caught:
        call()
    assert said in str(caught.value) and "\n" not in str(caught.value)
