"""Bad invocations: each is one clear sentence, raised before anything starts, that names what is wrong."""

from pathlib import Path

import pytest

from common.errors import UserError
from conf.load import load
from conf.prompts import resolve_prompts
from conf.resume import save_config
from conf.validate import cluster_fits, validate
from tests.running import EXPERIMENT

TWO_CORES = {"CPU": 2.0}

# (words of the command, what the sentence must say)
BAD = [
    # what to run
    (["compresibility"], "did you mean compressibility"),
    (["nosuch.yaml"], "there is no experiment 'nosuch.yaml'"),
    (["."], "there is no experiment '.'"),
    # malformed settings
    (["compressibility", "learner.lr"], "write key=value"),
    (["compressibility", "--learner.lr=1"], "write key=value"),
    (["compressibility", "=1"], "write key=value"),
    (["compressibility", "learner..lr=1"], "write key=value"),
    (["compressibility", "prompts.list=[a cat"], "not valid YAML"),
    (["compressibility", "experiment=incompressibility"], "first word"),
    # unknown keys
    (["compressibility", "learner.lrr=1e-4"], "did you mean learner.lr?"),
    (["compressibility", "lerner.lr=1e-4"], "did you mean learner?"),
    (["compressibility", "lr=1e-4"], "did you mean learner.lr?"),
    (["compressibility", "rewards.compressibility.wieght=2"], "did you mean rewards.compressibility.weight?"),
    (["compressibility", "rewards.beauty.weight=2"], "rewards.beauty.path has no value"),
    # wrong types
    (["compressibility", "samplers.count=two"], "samplers.count=two has the wrong type: it takes int"),
    (["compressibility", "samplers.count=2.5"], "samplers.count=2.5 has the wrong type: it takes int"),
    (["compressibility", "samplers.count=true"], "wrong type: it takes int"),
    (["compressibility", "learner.lr=fast"], "wrong type: it takes float"),
    (["compressibility", "learner.lr="], "learner.lr=null has the wrong type"),
    (["compressibility", "learner=3"], "names a group of settings"),
    (["compressibility", "sampling=null"], "names a group of settings"),
    (["compressibility", "rewards.compressibility=3"], "names a group of settings"),
    (["compressibility", "model.dtype=float8"], "float32 | float16 | bfloat16"),
    (["compressibility", "learner.guidance_gradient=half"], "full | conditional"),
    (["compressibility", "learner.betas=[0.9]"], "[float, float]"),
    (["compressibility", "ray.dashboard=7"], "it takes bool"),
    (["compressibility", "run.name=${run.nme}"], "run.name cannot be worked out"),
    (["compressibility", "run.name=${run.name}"], "run.name cannot be worked out"),
    # impossible values
    (["compressibility", "learner.lr=0"], "learner.lr=0.0 must be above 0 and at most 1"),
    (["compressibility", "learner.lr=nan"], "learner.lr=nan must be finite"),
    (["compressibility", "learner.clip_range=-1e-4"], "learner.clip_range=-0.0001 must be greater than 0"),
    (["compressibility", "learner.betas=[0.9,1.0]"], "learner.betas=[0.9, 1.0] must lie between 0 and 1"),
    (["compressibility", "run.batches=0"], "run.batches=0 must be at least 1"),
    (["compressibility", "run.seed=-1"], "run.seed=-1 must not be negative"),
    (["compressibility", "sampling.steps=0"], "sampling.steps=0 must lie between 1 and 1000"),
    (["compressibility", "sampling.steps=1001"], "sampling.steps=1001 must lie between 1 and 1000"),
    (["compressibility", "sampling.eta=1.5"], "sampling.eta=1.5 must lie between 0 and 1"),
    (["compressibility", "sampling.guidance=0.5"], "sampling.guidance=0.5 must be at least 1"),
    (["compressibility", "sampling.latents_dtype=bfloat16"], "sampling.latents_dtype=bfloat16 cannot be stored"),
    (["compressibility", "model.lora.rank=0"], "model.lora.rank=0 must lie between 1 and 4096"),
    (["compressibility", "model.lora.targets=[]"], "model.lora.targets is empty"),
    (["compressibility", "model.lora.rank=1000000000000"], "model.lora.rank=1000000000000 must lie between 1 and 4096"),
    (["compressibility", "model.lora.alpha=1e-300"], "model.lora.alpha=1e-300 must lie between 0.001 and 1000000"),
    (["compressibility", "samplers.threads=3000000000"], "samplers.threads=3000000000 must lie between 1 and 4096"),
    (["compressibility", "learner.num_cpus=1e-5"], "learner.num_cpus=1e-05 must be a whole number, or a share"),
    (["compressibility", "rewards.compressibility.weight=1e39"], "must lie between -1000000 and 1000000"),
    (["compressibility", "rewards.compressibility.range=[0,.inf]"], "range=(0.0, inf) must be finite"),
    (["compressibility", "rewards.compressibility.args.k=[.nan]"], "args.k=[nan] must be finite"),
    (["compressibility", "samplers.num_cpus=1.5"], "samplers.num_cpus=1.5 must be a whole number"),
    (["compressibility", "buffer.max_failed_share=1.1"], "buffer.max_failed_share=1.1 must lie between 0 and 1"),
    (["compressibility", "run.name=../elsewhere"], "run.name='../elsewhere' must be a folder's name"),
    (["compressibility", "run.name=.."], "run.name='..' must be a folder's name"),
    (["compressibility", "rewards.advantage.path=compressibility"], "rewards.advantage: 'advantage' cannot be"),
    # impossible combinations
    (["compressibility", "buffer.order_size=24"], "buffer.batch_size=64 is not divisible by buffer.order_size=24"),
    (["compressibility", "buffer.order_size=32"], "makes 2 orders of buffer.order_size=32"),
    (["compressibility", "buffer.batch_size=2", "buffer.order_size=1"], "buffer.batch_size=2 is too small"),
    (["compressibility", "evaluation.count=100"], "evaluation.count=100 is not divisible by buffer.order_size=16"),
    (["compressibility", "evaluation.grid=129"], "evaluation.grid=129 is more than evaluation.count=128"),
    (["compressibility", "buffer.group_size=3"], "buffer.batch_size=64 is not divisible by buffer.group_size=3"),
    (["counting", "sampling.same_noise=true"], "sampling.same_noise=true with buffer.group_size=1"),
    (
        ["compressibility", "sampling.same_noise=true", "buffer.group_size=4", "sampling.eta=0"],
        "sampling.same_noise=true with sampling.eta=0 makes all pictures of a group the same",
    ),
    (
        ["nft_compressibility", "sampling.eta=0", "learner.kl_target=0.1"],
        "learner.kl_target=0.1 with sampling.eta=0: without noise",
    ),
    (["compressibility", "learner.train_share=0"], "learner.train_share=0.0 must be above 0 and at most 1"),
    (["compressibility", "learner.train_share=0.02", "learner.optimizer_steps=2"], "more than the 1 trajectories"),
    (["compressibility", "learner.train_steps=0"], "learner.train_steps=0 must be at least 1"),
    (["compressibility", "learner.train_steps=7"], "learner.train_steps=7 is more than sampling.steps=6"),
    (["compressibility", "learner.optimizer_steps=65"], "learner.optimizer_steps=65 is more than"),
    (
        ["compressibility", "learner.kl_weight=0", "learner.kl_target=0.1"],
        "learner.kl_target=0.1 with learner.kl_weight=0 has no weight",
    ),
    (["compressibility", "learner.kl_weight=-1"], "learner.kl_weight=-1"),
    (["compressibility", "learner.tracker_min_count=33"], "learner.tracker_min_count=33 is never reached"),
    (
        ["compressibility", "rewards.compressibility.weight=0"],
        "nothing to train on with rewards.compressibility.weight",
    ),
    (["alignment", "combine=product"], "combine=product needs rewards.caption.range"),
    (["alignment", "combine=max"], "sum | product"),
    (["alignment", "rewards.caption.range=[1,0]"], "rewards.caption.range=[1.0, 0.0] must be two numbers"),
    (
        ["alignment", "combine=product", "rewards.caption.range=[0,1]", "rewards.caption.weight=-1"],
        "rewards.caption.weight=-1.0 is an exponent",
    ),
    (["compressibility", "model.dtype=float64"], "model.dtype=float64 is only for checking numerics"),
    (["compressibility", "learner.count=2", "learner.num_gpus=0.5"], "learner.num_gpus=0.5 with learner.count=2"),
    # texts
    (["compressibility", "run.name=null"], "run.name=null has the wrong type: it takes str"),
    (["compressibility", "prompts.list=[a cat: big]"], "prompts.list: entry 1 is {'a cat': 'big'} and not a text"),
    (["compressibility", "prompts.list=[a cat, null]"], "prompts.list: entry 2 is null and not a text"),
    (["compressibility", "prompts.list=[a cat] # mine"], "goes on after its end, with # mine"),
    (["compressibility", "prompts.list=['a ${run.seed}']"], "which has a meaning of its own"),
    (["compressibility", "prompts.list=[" + "[" * 5000], "nested too deeply"),
    (["compressibility", "model.revision="], "model.revision= cannot be used: it is empty"),
    (["compressibility", "learner.lr=" + "9" * 5000], "learner.lr="),
    (["compressibility", "x" * 5000 + "=1"], "there is no setting xxx"),
    (["x" * 5000], "there is no experiment 'xxx"),
    (["compressibility", "rewards.prompt.path=compressibility"], "rewards.prompt: 'prompt' cannot be"),
    # prompts
    (["compressibility", "prompts.set=emoji_finetun"], "did you mean emoji_finetune"),
    (["compressibility", "prompts.set=null"], "give exactly one"),
    (["compressibility", "prompts.set=counting", "prompts.list=[a cat]"], "prompts.set and prompts.list are given"),
    (["compressibility", "prompts.list=[]"], "prompts.list is empty"),
    (["compressibility", "prompts.list=[a cat,'']"], "entry 2 is blank"),
    (["compressibility", "prompts.list=[a cat,a cat]"], "'a cat' stands in entry 1 and in entry 2"),
    (["compressibility", "prompts.file=nosuch.txt"], "prompts.file=nosuch.txt cannot be read"),
]


def one_sentence(error: UserError) -> str:
    message = str(error)
    assert "\n" not in message and "Traceback" not in message and "omegaconf" not in message.lower()
    assert len(message) < 500
    return message


@pytest.mark.parametrize(("words", "says"), BAD, ids=[" ".join(words)[:60] for words, _ in BAD])
def test_a_bad_invocation_is_one_sentence(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        validate(load(words))
    assert says in one_sentence(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learner: {lr: 1e-4", "is not valid YAML"),
        ("learner:\n  lr: 1e-4\n  lr: 2e-4\n", "duplicate key lr"),
        ("- a\n- b\n", "must hold settings as key: value"),
        ("learner: {leraning_rate: 1}\n", "no setting learner.leraning_rate"),
        ("rewards: [compressibility]\n", "names a group of settings"),
        ("sampling: {steps: many}\n", "sampling.steps=many has the wrong type"),
        ("run: {name: '${nowhere}'}\n", "run.name cannot be worked out"),
        ("learner: {lr: 1e-4}\n", "no reward is set"),
        ("just words\n", "there is no setting just words"),
    ],
)
def test_a_bad_experiment_file_is_named_in_one_sentence(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        validate(load([str(path), "prompts.list=[a cat]"]))
    assert says in one_sentence(caught.value)


def test_a_runs_folder_in_the_place_of_its_settings_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_config(Path("runs/mine"), load(["compressibility"]), ["a cat"])
    with pytest.raises(UserError, match=r"'runs/mine' is a run's folder: give runs/mine/config\.yaml"):
        load(["runs/mine"])


def test_a_run_goes_on_with_its_own_prompts_where_their_file_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("a cat\na dog\n")
    begun = load(["compressibility", "prompts.file=mine.txt", "run.name=mine"])
    prompts = resolve_prompts(begun.prompts)
    save_config(Path("runs/mine"), begun, prompts)
    Path("mine.txt").unlink()
    again = load(["runs/mine/config.yaml"])
    assert resolve_prompts(again.prompts) == prompts
    assert resolve_prompts(load(["runs/mine/config.yaml", "prompts.list=[a bee]"]).prompts) == ["a bee"]


def test_binary_experiment_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="not valid YAML"):
        load([str(path)])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no prompt"),
        (b"\n  \n\n", "holds no prompt"),
        (b"a cat\n\na dog\na cat\n", "'a cat' stands in line 1 and in line 4"),
        (b"\xff\xfea\x00", "not a text file in UTF-8"),
        (b"a cat\n" + b"x" * 5000 + b"\n", "line 2 has 5000 characters"),
        (b"a cat\x07\n", "control character"),
    ],
)
def test_a_bad_prompt_file_is_named_in_one_sentence(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        validate(load(["compressibility", f"prompts.file={path}"]))
    assert says in one_sentence(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("words", "resources", "says"),
    [
        (["learner.num_cpus=2"], TWO_CORES, "has 2 CPUs, but one actor of each role needs 2.75"),
        (["rewards.a.path=compressibility", "rewards.a.num_cpus=1"], TWO_CORES, "reward a 1"),
        (["rewards.compressibility.num_gpus=1"], {"CPU": 8.0, "GPU": 2.0}, "has 2 GPUs, but one actor of each"),
        ([], {}, "has 0 CPUs"),
    ],
)
def test_a_cluster_too_small_is_refused_with_numbers(words: list[str], resources: dict[str, float], says: str) -> None:
    with pytest.raises(UserError) as caught:
        cluster_fits(load([EXPERIMENT, *words]), resources)
    assert says in one_sentence(caught.value)
