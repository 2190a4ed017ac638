from pathlib import Path

import pytest

from evalkit.config import RunConfig
from evalkit.errors import InputError


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_a_file_and_overrides_are_read_in_order(tmp_path: Path):
    path = toml(
        tmp_path, 'name = "a"\ntask_documents = 100\ntasks = ["needle"]\ncandidates = ["bf16@reference"]\n'
    )
    loaded = RunConfig.load(path, ["task_documents=7", "tasks=needle, walk", "task_documents=8", "name=b"])
    assert (loaded.name, loaded.task_documents, loaded.tasks) == ("b", 8, ("needle", "walk"))
    assert loaded.candidates == ("bf16@reference",)
    assert RunConfig.load(path, ["candidates=default"]).candidates == "default"


def test_a_name_of_digits_stays_text():
    assert RunConfig.load(None, ["name=123"]).name == "123"


def test_an_optional_value_is_taken_back_with_null():
    assert RunConfig.load(None, ["device=cpu", "device=null"]).device is None


def test_what_a_run_directory_keeps_makes_the_same_configuration(tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("once upon a time")
    loaded = RunConfig.load(
        None, [f"layers_prompts={prompts}", "tasks=a,b", "candidates=bf16@reference", "seed=5"]
    )
    assert RunConfig.from_json(loaded.to_json()) == loaded
    assert RunConfig.from_json(RunConfig().to_json()) == RunConfig()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task_document = 3", "unknown key 'task_document', did you mean 'task_documents'"),
        ('seed = "3"', "seed is '3': it takes an integer"),
        ("seed = true", "seed is True"),
        ("tasks = [1]", r"tasks is \[1\]: it takes a list of names"),
        ('candidates = "bf16"', """candidates is 'bf16': it takes a list of names or "default\""""),
        ("candidates = []", "candidates is empty"),
        ("batch_size = 0", "batch_size is 0: it must be at least 1"),
        ('device = "gpu"', "device is 'gpu': give cpu, cuda"),
        ('dtype = "fp8"', "dtype is 'fp8'"),
        ('name = "../up"', "name is '../up'"),
        ("seed = ", "not TOML"),
        ('layers_prompts = "nowhere.txt"', "no text file at nowhere.txt"),
    ],
)
def test_a_bad_file_is_refused_in_words(text: str, said: str, tmp_path: Path):
    with pytest.raises(InputError, match=said) as caught:
        RunConfig.load(toml(tmp_path, text))
    assert "\n" not in str(caught.value).replace("\\n", "")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "give it as key=value"),
        ("seed=x", "seed is 'x': it takes an integer"),
        ("sead=1", "did you mean 'seed'"),
        ("seed=-1", "at least 0"),
    ],
)
def test_a_bad_override_is_refused_in_words(override: str, said: str):
    with pytest.raises(InputError, match=said):
        RunConfig.load(None, [override])


@pytest.mark.parametrize(("content", "said"), [(b" \n", "is empty"), (b"\xff\xfe\xff", "not UTF-8")])
def test_prompts_without_text_are_refused(content: bytes, said: str, tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(content)
    with pytest.raises(InputError, match=said):
        RunConfig.load(None, [f"layers_prompts={prompts}"])


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"no configuration '/.*/none.toml', neither a file nor a name"):
        RunConfig.load(tmp_path / "none.toml")
    with pytest.raises(InputError, match="is a directory"):
        RunConfig.load(tmp_path)


CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configurations_of_this_project_are_read_from_every_folder_by_name(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert RunConfig.load(path).name == path.stem
    assert RunConfig.load(path.stem) == RunConfig.load(path.name) == RunConfig.load(path)


def test_a_configuration_in_this_folder_goes_before_one_that_evalkit_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("nightly").write_text('name = "mine"')
    assert RunConfig.load("nightly").name == "mine"
    assert RunConfig.load("nightly.toml").name == "nightly"


def test_a_policy_is_kept_so_that_a_run_finds_it_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text("")
    own = toml(tmp_path, 'policy = "default.toml"')
    assert RunConfig.load(own).policy == "default"
    assert RunConfig.load(own, ["policy=mine.toml"]).policy == str(tmp_path / "mine.toml")
    assert RunConfig.load(own, ["policy=mine.toml"], policy="default").policy == "default"
    assert RunConfig.load(own, ["policy=null"]).policy is None
    with pytest.raises(InputError, match=r"no policy 'defualt', .* did you mean 'default'"):
        RunConfig.load(None, ["policy=defualt"])


@pytest.mark.parametrize(
    ("text", "value"), [("0.5", 0.5), ("5e-1", 0.5), ("1.", 1.0), (".25", 0.25), ("1", 1.0)]
)
def test_a_number_may_be_written_in_any_way_that_numbers_are(text: str, value: float):
    assert RunConfig.load(None, ["engine=vllm", f"memory_share={text}"]).memory_share == value


@pytest.mark.parametrize("text", ["nan", "inf", "half", "0.5 0.5", "1,5"])
def test_what_is_no_share_is_refused(text: str):
    with pytest.raises(InputError, match="memory_share is"):
        RunConfig.load(None, ["engine=vllm", f"memory_share={text}"])


def test_a_batch_size_is_a_number_or_left_to_the_device():
    assert RunConfig().batch_size == "auto"
    assert RunConfig.load(None, ["batch_size=4"]).batch_size == 4
    assert RunConfig.load(None, ["batch_size=4", "batch_size=auto"]).batch_size == "auto"
    with pytest.raises(InputError, match='it takes an integer or "auto"'):
        RunConfig.load(None, ["batch_size=many"])
