"""Where a command runs: hostfiles, and the variables by which others start ranks."""

from pathlib import Path

import pytest

from data.errors import UserError
from launch.agreement import disagreements
from launch.places import Host, first_node, hosts_wanted, is_batch_script, ranks_here, read_hostfile


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_a_hostfile_names_hosts_and_their_ranks(tmp_path: Path) -> None:
    path = hostfile(tmp_path, "# the cluster\n\ngpu-a slots=8\ngpu-b   slots=4 # the small one\n")
    assert read_hostfile(path) == [Host("gpu-a", 8), Host("gpu-b", 4)]
    assert read_hostfile(path, 2) == [Host("gpu-a", 2), Host("gpu-b", 2)]
    assert hosts_wanted(2, path) == [Host("gpu-a", 2), Host("gpu-b", 2)]


def test_every_mistake_in_a_hostfile_is_told_with_its_line(tmp_path: Path) -> None:
    path = hostfile(tmp_path, "a slots=8\nb\na slots=2\nc slots=0\n")
    with pytest.raises(UserError) as caught:
        read_hostfile(path)
    assert list(caught.value.problems) == [
        f"{path}:2: 'b' is no host; write `name slots=4`",
        f"{path}:3: a is there twice; add up its slots in one line",
        f"{path}:4: c has slots=0; 1 are needed on each host",
    ]


def test_more_ranks_than_slots_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a has slots=2; 4 are needed on each host"):
        hosts_wanted(4, hostfile(tmp_path, "a slots=2\n"))
    with pytest.raises(UserError, match="names no host"):
        hosts_wanted(None, hostfile(tmp_path, "# none\n"))


def test_one_process_and_many_here() -> None:
    assert hosts_wanted(None, None) == hosts_wanted(0, None) == hosts_wanted(1, None) == []
    assert hosts_wanted(4, None) == [Host("localhost", 4)]


def test_torchrun_is_recognised() -> None:
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1", "HOME": "/"}
    assert ranks_here(given) == {name: value for name, value in given.items() if name != "HOME"}
    assert ranks_here({**given, "WORLD_SIZE": "1"}) == {}
    with pytest.raises(UserError, match="MASTER_PORT: not set"):
        ranks_here({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"})


def test_srun_is_recognised_and_a_batch_script_is_not_taken_for_it() -> None:
    task = {"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "16"}
    task |= {"SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_JOB_ID": "40007"}
    assert ranks_here(task) == {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "20007",
    }
    assert not is_batch_script(task)
    assert is_batch_script({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"})
    assert ranks_here({**task, "SLURM_STEP_NUM_TASKS": "1"}) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("gpu[03-06,9],login", "gpu03"), ("n[7]", "n7"), ("rack1-[2-3]-ib,x", "rack1-2-ib")],
)
def test_the_first_of_slurms_nodes(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_what_differs_is_named_by_rank_and_host() -> None:
    same = {"torch": "2.13", "the code": "1 sha256:" + "a" * 64}
    other = {"torch": "2.12", "the code": "1 sha256:" + "b" * 64}
    assert disagreements([("a", same), ("a", dict(same))]) == []
    assert disagreements([("a", same), ("b", other)]) == [
        "rank 1 on b has another torch than rank 0 on a (2.12, not 2.13); make every host the same",
        "rank 1 on b has another code than rank 0 on a; make every host the same",
    ]
