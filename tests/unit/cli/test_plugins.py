"""Plug-ins: which are imported and which are not, and what each may enter."""

import copy
import os
import sys

import pytest
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import duo
from checkpoints.about import describe, missing_plugins
from checkpoints.reading import read_checkpoint
from cli import plugins
from cli.commandline import composed
from cli.known_keys import forget, refuse_unread
from cli.plugins import import_named, import_plugins
from cli.settle import algorithm_class
from data.registry import DATASETS
from data.tokenizers import get_tokenizer
from diffusion.base import Diffusion
from evaluation.harness import Arguments, complete, load
from main import carry_out
from metrics.registry import METRICS, measure
from models.network import Network
from models.noise import SCHEDULES, LogLinear, build_noise
from models.registry import BACKBONES
from sampling.predictors import Ancestral
from sampling.registry import SAMPLERS
from training.identity import record_of
from utils import ADDED, ConfigError

TABLES = (BACKBONES, DATASETS, SAMPLERS, SCHEDULES, METRICS, ADDED, plugins._ENTERED)


@pytest.fixture(autouse=True)
def _as_before(tmp_path, monkeypatch):
    """In a folder of its own; nothing that is entered or imported stays."""
    before = [dict(table) for table in TABLES]
    added = copy.deepcopy(ADDED)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv(plugins.FOLDER, raising=False)
    monkeypatch.chdir(tmp_path)
    modules = set(sys.modules)
    yield
    os.environ.pop(plugins.FOLDER, None)
    for name in set(sys.modules) - modules:
        if name.startswith("plug"):
            del sys.modules[name]
    for group, nodes in ADDED.items():
        for name in nodes.keys() - added.get(group, {}).keys():
            ConfigStore.instance().repo.get(group, {}).pop(f"{name}.yaml", None)
    for table, content in zip(TABLES, before, strict=True):
        table.clear()
        table.update(content)
    ADDED.update(added)
    forget()


def write(name: str, text: str) -> None:
    with open(f"{name}.py", "w") as file:
        file.write(text)


class Plain(Network):
    """A network with nothing beyond what is needed."""

    @classmethod
    def from_config(cls, config, vocab_size):
        return cls()

    def trunk(self, x, sigma=None):
        return x


# ---------------------------------------------------------------- importing


@pytest.mark.parametrize(
    "word", ["plugins=[plug_a]", "plugins=plug_a", "+plugins=[plug_a]"]
)
def test_a_module_of_the_folder_is_imported_once(word, tmp_path):
    write("plug_a", "import sys\nsys.plug_count = getattr(sys, 'plug_count', 0) + 1\n")
    sys.plug_count = 0
    import_named(["algo=mdlm", word], str(tmp_path))
    import_plugins(["plug_a"], str(tmp_path))
    assert sys.plug_count == 1


def test_a_process_that_begins_elsewhere_finds_it(tmp_path):
    (tmp_path / "plug_b").mkdir()
    write("plug_b/plug_c", "x = 1\n")
    import_plugins(["plug_c"], str(tmp_path / "plug_b"))
    del sys.modules["plug_c"]
    sys.path.remove(str(tmp_path / "plug_b"))
    import_plugins(["plug_c"], str(tmp_path))
    assert "plug_c" in sys.modules


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("plugins=[plug_none]", "there is no module plug_none in "),
        ("plugins=[plug_ok.py]", r"plugins=\[plug_ok\]\."),
        ("plugins=[plug_ok.inner]", r"there is no module plug_ok.inner"),
        ("plugins=[plug_syntax]", r"SyntaxError: .*\(plug_syntax.py, line 2\)"),
        (
            "plugins=[plug_other]",
            r"No module named 'nothing_here' \(.*_other.py, line 1",
        ),
        ("plugins=[plug_name]", r"NameError: .*\(.*plug_name.py, line 2\)"),
        ("plugins=[plug_exits]", r"SystemExit: 3 \(.*plug_exits.py, line 2\)"),
        ("plugins=[plug_taken]", r"plugins=\[plug_taken\]: there is a sampler 'psi'"),
        ("plugins=[random]", "the name is taken, by .*random.py, so .*random.py is"),
        ("plugins=[utils]", "the name is taken, by .*utils.py, so .*utils.py is"),
        ("plugins=[plug-a]", "'plug-a' is no name of a module"),
        ("plugins=[../plug_ok]", "is no name of a module"),
        ("plugins=[3]", "3 is no name of a module"),
        ("plugins=['']", "'' is no name of a module"),
        ("plugins={a: 1}", "is no list of modules"),
        ("plugins=plug_ok,plug_name", "give a list in brackets"),
    ],
)
def test_a_mistake_is_one_line(word, said, tmp_path):
    write("plug_ok", "")
    write("random", "")
    write("utils", "")
    write("plug_syntax", "x = 1\ny = 1 +\n")
    write("plug_other", "import nothing_here\n")
    write("plug_name", "\nf()\n")
    write("plug_exits", "import sys\nsys.exit(3)\n")
    write(
        "plug_taken",
        "import duo\nfrom sampling.predictors import Ancestral\n"
        "duo.sampler('psi')(Ancestral)\n",
    )
    with pytest.raises(ConfigError, match=said) as refused:
        import_named([word], str(tmp_path))
    assert "\n" not in str(refused.value)


def test_nothing_that_a_checkpoint_names_is_imported(tmp_path):
    """Neither a plug-in nor a class; the refusal says which plug-in is missing."""
    write("plug_evil", "open('was-run', 'w').close()\nclass Evil: pass\n")
    algo = {"_target_": "plug_evil.Evil", "name": "evil", "backbone": "evil"}
    config = {"plugins": ["plug_evil"], "algo": algo, "noise": {"type": "evil"}}
    torch.save({"state_dict": {}, "hyper_parameters": {"config": config}}, "evil.ckpt")
    checkpoint = read_checkpoint("evil.ckpt", "eval.checkpoint_path")
    assert describe(checkpoint)["plug-ins"] == "plug_evil"
    said = r"algo=evil.* made with plugins=\[plug_evil\].* add them, if you trust"
    with pytest.raises(ConfigError, match=said):
        complete([], checkpoint)
    with pytest.raises(ConfigError, match=said):
        duo.load("evil.ckpt")
    for words in (["algo=mdlm"], ["algo=mdlm", "algo.backbone=dit"]):
        with pytest.raises(ConfigError, match=r"plugins=\[plug_evil\]|evil"):
            duo.load("evil.ckpt", *words, "model=tiny", "data=synthetic")
    assert "plug_evil" not in sys.modules
    assert not os.path.exists("was-run")


@pytest.mark.parametrize("stated", [None, [], "", 3, {"a": 1}, ["plug_a"], "plug_a"])
def test_what_is_said_of_missing_plugins(stated, tmp_path):
    torch.save({"hyper_parameters": {"config": {"plugins": stated}}}, "a.ckpt")
    checkpoint = read_checkpoint("a.ckpt", "eval.checkpoint_path")
    said = missing_plugins(checkpoint, OmegaConf.create({"plugins": ["plug_b"]}))
    assert ("plugins=[plug_a]" in said) == (stated in (["plug_a"], "plug_a"))
    assert not missing_plugins(checkpoint, OmegaConf.create({"plugins": "plug_a"}))


# ---------------------------------------------------------------- entering


def test_what_is_entered_is_in_the_config():
    duo.backbone("plain", width=3, length=16)(Plain)
    duo.dataset("words", count=2)(lambda config, split: ["a"] * config.data.count)
    duo.algorithm("mine", extends="mdlm", rate=0.5)(type("Mine", (Diffusion,), {}))
    duo.schedule("slow", eps=0.01)(type("Slow", (LogLinear,), {}))
    words = ["algo=mine", "model=plain", "data=words", "noise=slow", "data.count=5"]
    config = composed([*words, "algo.backbone=plain", "algo.rate=1", "model.width=4"])
    refuse_unread(config)
    assert config.algo == {**composed(["algo=mdlm"]).algo, **config.algo}
    assert (config.algo.rate, config.algo.name) == (1, "mine")
    assert config.model == {"name": "plain", "type": "plain", "length": 16, "width": 4}
    assert (config.data.train, config.data.valid, config.data.count) == (
        *("words", "words"),
        5,
    )
    assert config.noise == {"type": "slow", "eps": 0.01}
    assert build_noise(config.noise).eps == 0.01
    with pytest.raises(ConfigError, match=r"Did you mean 'model\.width'"):
        composed(["model=plain", "model.widht=4"])
    with pytest.raises(ConfigError, match=r"model.widht.*Did you mean 'model.width'"):
        refuse_unread(composed(["model=plain", "+model.widht=4"]))
    with pytest.raises(ConfigError, match=r"of your own comes with plugins="):
        composed(["algo=xyz"])
    with pytest.raises(ConfigError, match=r"Unknown algo='mime'.*'mine'.*mine, "):
        composed(["algo=mime"])


def test_files_of_the_users_own_may_have_any_keys(tmp_path):
    """Of a kind that no file of the project has."""
    write("plug_table", "from models.registry import BACKBONES, BackboneSpec\n")
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf/model/net.yaml").write_text("{name: net, type: net, depth: 3}")
    path = f"hydra.searchpath=[file://{tmp_path}/conf]"
    config = composed([path, "plugins=[plug_table]", "model=net"])
    refuse_unread(config)
    assert config.model.depth == 3


def test_a_sampler_has_settings_of_its_own():
    duo.sampler("grid", power=2, kind="a")(type("Grid", (Ancestral,), {}))
    config = composed(["sampling.predictor=grid", "sampling.grid.power=3"])
    refuse_unread(config)
    assert config.sampling.grid == {"power": 3, "kind": "a"}
    assert composed(["algo=mdlm"]).sampling.grid.power == 2
    for word in ("sampling.grid.pover=3", "+sampling.grid.pover=3"):
        with pytest.raises(ConfigError, match=r"Did you mean 'sampling\.grid\.power'"):
            refuse_unread(composed([word]))


@pytest.mark.parametrize(
    ("enter", "said"),
    [
        (lambda: duo.backbone("dit")(Plain), "there is a backbone 'dit' already"),
        (
            lambda: duo.backbone("tiny")(Plain),
            "there is a backbone 'tiny'",
        ),
        (lambda: duo.backbone("net")(Network), "lacks from_config and trunk"),
        (lambda: duo.backbone("net")(torch.nn.Linear), "Linear lacks Network"),
        (lambda: duo.backbone("net", a=object())(Plain), "backbone 'net': "),
        (lambda: duo.dataset("text8")(list), "there is a data set 'text8' already"),
        (lambda: duo.dataset("_base")(list), "there is a data set '_base'"),
        (lambda: duo.sampler("psi")(Ancestral), "there is a sampler 'psi' already"),
        (lambda: duo.sampler("ddpm")(Ancestral), "sampling. 'ddpm' already"),
        (lambda: duo.sampler("steps", a=1)(Ancestral), "sampling. 'steps' already"),
        (lambda: duo.sampler("net")(Plain), "derive from sampling.sampler.Sampler"),
        (lambda: duo.schedule("linear")(LogLinear), "a schedule 'linear' already"),
        (lambda: duo.schedule("net")(Plain), "does not derive from models.noise.Noise"),
        (lambda: duo.schedule("net", a=1)(LogLinear), "LogLinear has no argument 'a'"),
        (
            lambda: duo.algorithm("ar", extends="mdlm")(Diffusion),
            "algorithm 'ar' already",
        ),
        (lambda: duo.algorithm("net", extends="mdml")(Diffusion), "extends='mdml' is"),
        (lambda: duo.algorithm("net", extends="mdlm")(Plain), "does not derive from"),
        (lambda: duo.metric("entropy")(len), "no other number of samples"),
        (lambda: duo.metric("data")(len), "no other number of samples"),
        (lambda: duo.metric("a b")(len), "give a name of letters"),
    ],
)
def test_what_cannot_be_entered_is_one_line(enter, said):
    before = [dict(table) for table in TABLES]
    with pytest.raises(ConfigError, match=said) as refused:
        enter()
    assert "\n" not in str(refused.value)
    assert [dict(table) for table in TABLES] == before


def test_a_cell_of_a_notebook_may_run_again():
    for width in (3, 4):
        duo.backbone("plain", width=width)(type("Plain", (Plain,), {}))
        duo.sampler("again")(type("Again", (Ancestral,), {}))
        duo.metric("length")(lambda tokens, texts: map(len, texts))
    assert composed(["model=plain"]).model.width == 4


def test_a_schedule_without_defaults_has_to_be_given_them():
    class Steep(LogLinear):
        def __init__(self, power, eps=0.1):
            super().__init__(eps)

    with pytest.raises(ConfigError, match="power of Steep has no default"):
        duo.schedule("steep")(Steep)
    duo.schedule("steep", power=2)(Steep)
    assert composed(["noise=steep"]).noise == {"type": "steep", "power": 2, "eps": 0.1}


def test_a_metric_gives_a_number_a_sample():
    tokens, texts = torch.zeros(2, 3, dtype=torch.long), ["a", "bcd"]
    duo.metric("length")(lambda tokens, texts: torch.tensor([len(x) for x in texts]))
    assert measure(tokens, texts) == {"length": [1.0, 3.0]}
    duo.metric("length")(lambda tokens, texts: [1.0])
    with pytest.raises(ConfigError, match="gives 1 numbers for 2 samples"):
        measure(tokens, texts)
    duo.metric("length")(lambda tokens, texts: 1.0)
    with pytest.raises(ConfigError, match="a number a sample"):
        measure(tokens, texts)


def test_a_data_set_gives_texts():
    duo.dataset("numbers", tokenizer_name_or_path="bytes")(lambda config, split: [1])
    config = composed(["data=numbers", "model=tiny", "model.length=16"])
    with pytest.raises(ConfigError, match=r"data.train='numbers' gives 1, a int"):
        DATASETS["numbers"].load(config, get_tokenizer(config), "train")


# ---------------------------------------------------------------- whole modes

SMALL = (
    *("algo=mdlm", "data=synthetic", "data.vocab_size=7", "model=tiny"),
    *("model.length=8", "model.n_blocks=1", "model.hidden_size=8", "model.n_heads=2"),
    "trainer.accelerator=cpu",
)


def save(path: str, *words: str) -> None:
    """A checkpoint of an untrained model."""
    config = composed([*SMALL, *words])
    model = algorithm_class(config)(config, get_tokenizer(config))
    content = {"state_dict": model.state_dict(), "identity": record_of(config, {})}
    model.on_save_checkpoint(content)
    torch.save(content, path)


def test_a_schedule_of_a_plugin_is_not_exported():
    duo.schedule("slow")(type("Slow", (LogLinear,), {}))
    save("slow.ckpt", "noise=slow")
    words = ["mode=export", "eval.checkpoint_path=slow.ckpt", "export.path=exported"]
    with pytest.raises(ConfigError, match=r"noise\.type='slow' is of a plug-in"):
        carry_out(composed(words), os.getcwd(), words)
    assert not os.path.exists("exported")


def test_a_recipe_and_the_harness_may_name_them(tmp_path):
    write(
        "plug_net",
        "import duo\nfrom models.dit import DIT\n"
        "@duo.backbone('net', hidden_size=8, cond_dim=8, n_blocks=1, n_heads=2,\n"
        "              dropout=0, attention='auto')\n"
        "class Net(DIT):\n    pass\n",
    )
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    recipe = "# @package _global_\nplugins: [plug_net]\nalgo: {backbone: net}\n"
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(recipe)
    path = f"hydra.searchpath=[file://{tmp_path}/conf]"
    config = composed([path, "experiment=mine", *SMALL])
    assert config.algo.backbone == "net"
    assert "net" in BACKBONES
    own = ("model=net", "algo.backbone=net", "plugins=[plug_net]")
    save("net.ckpt", *own, "model.length=8", "model.hidden_size=8")
    given = Arguments(checkpoint="net.ckpt", device="cpu", overrides=own[2])
    assert type(load(given).model.backbone).__name__ == "Net"
    trained = duo.load("net.ckpt", own[2], device="cpu")
    assert len(trained.sample(2, steps=2)) == 2
    assert trained.evaluate("loader.eval_batch_size=64")["ppl"] > 1
