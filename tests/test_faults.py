"""What happens when a rank dies, is late, leaves, or asks for something else. Each test starts its own mpirun."""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

import extrapcomm as xc

OPEN_MPI = "Open MPI" in MPI.Get_library_version()
SURVIVORS = ["--with-ft", "ulfm"] if OPEN_MPI else ["-disable-auto-cleanup"]
# MPICH's launcher signals the survivors, and kills about half of them when it has reaped the dead rank before it sees
# the rank's connection close. So there a shell stands between the two and outlives all ranks, or gives up on them.
OUTLIVE = """
trap "" USR1
"$@"
echo >> "$EXTRAPCOMM_TEST_REPORT.ended"
for tenth in $(seq 300); do
  [ $(wc -l < "$EXTRAPCOMM_TEST_REPORT.ended") -ge $PMI_SIZE ] && exit
  sleep 0.1
done
"""
SHELTER = [] if OPEN_MPI else ["sh", "-c", OUTLIVE, "sh"]
LIMIT = 100

PRELUDE = """
import os, signal, sys, time
import numpy as np
import extrapcomm as xc

SOON = 10  # seconds; deadlines that would end the same wait are 30 and more

def engine_of(world, **options):
    return xc.Engine(world, np.ones(5000, "float32"), momentum=0.9, extrapolation="local", lr=0.1, **options)

def report(error):
    say(f"{type(error).__name__} rank={getattr(error, 'rank', '')} {error}")

def say(text):
    with open(os.environ["EXTRAPCOMM_TEST_REPORT"], "ab", buffering=0) as file:
        file.write(f"{text}\\n".encode())
"""


def run_ranks(ranks, script, *options):
    """The exit code, output and seconds of a script under mpirun; the whole group is killed when it takes too long.

    What ranks `say` goes through a file and stands first in the output: MPICH's launcher forwards no more output of the
    survivors once a rank has died.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report")
        report.touch()
        code, printed, seconds = launch(ranks, script, report, *options)
        return code, report.read_text() + printed, seconds


def launch(ranks, script, report, *options):
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PMIX_", "OMPI_COMM", "PMI_")) and name != "PYTEST_CURRENT_TEST"
    }
    environment["EXTRAPCOMM_TEST_REPORT"] = str(report)
    environment["OMPI_MCA_btl_sm_backing_directory"] = str(report.parent)  # Open MPI 5 leaves a file there
    shelter = SHELTER if list(options) == SURVIVORS else []
    python = [*shelter, sys.executable, "-c", PRELUDE + textwrap.dedent(script)]
    command = ["mpirun", *options, "-n", str(ranks), *python]
    since = time.monotonic()
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said = report.read_text() + process.communicate()[0]
        pytest.fail(f"the ranks hang; so far they said:\n{said}")
    return process.returncode, output, time.monotonic() - since


@pytest.mark.own_mpirun
def test_killed_rank_is_named_by_every_survivor():
    _, output, _ = run_ranks(
        3,
        """
        world = xc.World(step_timeout=30)
        engine = engine_of(world)
        engine.step()
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        since = time.monotonic()
        try:
            engine.step()
        except xc.PeerError as error:
            report(error)
            say(f"weights still readable: {engine.master()[0]}")
            say("soon" if time.monotonic() - since < SOON else "late")
        time.sleep(1)  # the launcher forwards what was said
        os._exit(0)
        """,
        *SURVIVORS,
    )
    assert output.count("PeerError rank=1 rank 1 died") == 2, output
    assert output.count("weights still readable: 1.0") == 2 and output.count("soon") == 2, output


@pytest.mark.own_mpirun
def test_default_launcher_ends_the_job_when_a_rank_is_killed():
    before = set(Path("/dev/shm").iterdir())
    code, output, seconds = run_ranks(
        2,
        """
        engine = engine_of(xc.World())
        engine.step()
        if engine.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            engine.step()
        """,
    )
    assert code != 0 and seconds < LIMIT / 2, output
    assert not [f for f in set(Path("/dev/shm").iterdir()) - before if "extrapcomm" in f.name]


@pytest.mark.own_mpirun
def test_late_rank_is_named_by_all_when_the_deadline_passes():
    code, output, _ = run_ranks(
        3,
        """
        world = xc.World(step_timeout=1.0)
        engine = engine_of(world)
        engine.step()
        if world.rank == 2:
            time.sleep(3)
        try:
            engine.step()
        except xc.PeerError as error:
            report(error)
        """,
    )
    assert code == 0 and output.count("PeerError rank=2 rank 2 did not come in time") == 3, output
    assert "meeting A of step 2 after 1 s" in output


@pytest.mark.own_mpirun
def test_stopped_rank_is_found_by_the_deadline():
    _, output, _ = run_ranks(
        2,
        """
        world = xc.World(step_timeout=1.0)
        engine = engine_of(world)
        pids = world.comm.allgather(os.getpid())
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        try:
            engine.step()
        except xc.PeerError as error:
            report(error)
        if world.rank == 0:
            os.kill(pids[1], signal.SIGCONT)
        """,
    )
    assert "PeerError rank=1 rank 1 did not come in time" in output, output


@pytest.mark.own_mpirun
def test_rank_that_exits_ends_the_wait_of_the_others():
    code, output, seconds = run_ranks(
        3,
        """
        engine = engine_of(xc.World())
        engine.step()
        if engine.world.rank == 1:
            sys.exit(3)
        try:
            engine.step()
        except xc.PeerError as error:
            report(error)
            sys.exit(4)
        """,
    )
    assert code != 0 and seconds < LIMIT / 2
    assert output.count("PeerError rank=1 rank 1 left") == 2, output


@pytest.mark.own_mpirun
def test_waiting_is_announced():
    code, output, _ = run_ranks(
        2,
        """
        import logging
        logging.basicConfig()
        world = xc.World(warn_after=0.3)
        engine = engine_of(world)
        time.sleep(1.2 * world.rank)
        engine.step()
        """,
    )
    assert code == 0 and "rank 0 has waited" in output and "at meeting A of step 1 for rank 1" in output, (
        output
    )


@pytest.mark.own_mpirun
def test_interrupt_reaches_a_waiting_rank_and_its_peers():
    code, output, _ = run_ranks(
        2,
        """
        import threading
        world = xc.World()
        engine = engine_of(world)
        if world.rank == 0:
            threading.Timer(1.0, signal.raise_signal, [signal.SIGINT]).start()
            try:
                engine.step()
            except KeyboardInterrupt as error:
                report(error)
        else:
            time.sleep(2.5)
            try:
                engine.step()
            except xc.PeerError as error:
                report(error)
        """,
    )
    assert code == 0 and "KeyboardInterrupt" in output and "rank 0 was interrupted" in output, output


@pytest.mark.own_mpirun
def test_rank_missing_at_a_construction_is_an_error():
    code, output, _ = run_ranks(
        2,
        """
        world = xc.World(pass_timeout=1.0)
        if world.rank == 0:
            try:
                engine_of(world)
            except xc.CommError as error:
                report(error)
        else:
            time.sleep(2.5)
        os._exit(0)
        """,
    )
    assert "CommError" in output and "same collective call" in output, output


@pytest.mark.own_mpirun
def test_memory_through_posix_names_works_and_leaves_nothing():
    before = set(Path("/dev/shm").iterdir())
    code, output, _ = run_ranks(
        2,
        """
        with xc.World(provider="posix") as world:
            engine = engine_of(world)
            engine.step()
            named = [name for name in os.listdir("/dev/shm") if "extrapcomm" in name]
            say(f"names while running: {len(named)}")
        """,
    )
    assert code == 0 and output.count("names while running: 0") == 2, output
    assert not [f for f in set(Path("/dev/shm").iterdir()) - before if "extrapcomm" in f.name]


def test_mismatches_are_the_same_error_on_every_rank(world):
    """A different shape, option, hyper-parameter or call on one rank; afterwards the engine still works."""
    import numpy as np

    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    odd = world.rank == world.size - 1
    cases = [
        (np.ones(5 + odd), {}, r"\(5\).*\(6\)"),
        (np.ones(5, "f" if odd else "d"), {}, "float64.*float32"),
        (
            np.ones(5),
            {"extrapolation": "local" if odd else "none"},
            "extrapolation none.*extrapolation local",
        ),
        (np.ones(5), {"rule": "adam" if odd else "sgd"}, "rule sgd.*rule adam"),
    ]
    for weights, options, text in cases:
        with pytest.raises(xc.MismatchError, match=text):
            xc.Engine(world, weights, **options)
    engine = xc.Engine(world, np.ones(5), lr=0.5)
    with pytest.raises(xc.MismatchError, match="lr of parameter group 0 is 0.5 on rank 0 but 0.25"):
        engine.step(lr=0.25 if odd else 0.5)
    with pytest.raises(xc.UsageError, match=f"rank {world.size - 1}: lr must be finite"):
        engine.step(lr=float("nan") if odd else 0.5)
    assert engine.master().tolist() == [1.0] * 5
    engine.grads[:] = 1
    engine.step(lr=0.5)
    assert engine.weights.tolist() == [0.5] * 5
    engine.close()


def test_wrong_argument_on_one_rank_is_an_error_on_all(world):
    import numpy as np

    odd = world.rank == world.size - 1
    with pytest.raises(xc.UsageError, match="there is no rule 'sdg'"):
        xc.Engine(world, np.ones(5), rule="sdg" if odd else "sgd")
    with pytest.raises(xc.UsageError, match="int64"):
        xc.Engine(world, np.ones(5, "int64" if odd else "float64"))
    with pytest.raises(xc.UsageError, match="no.*momentun"):
        xc.Engine(world, np.ones(5), **({"momentun": 0.9} if odd else {}))
    array = xc.arena_array(4, world=world)
    with pytest.raises(xc.UsageError, match="root 99 is not one of"):
        xc.broadcast(array, root=99 if odd else 0)
    with pytest.raises(xc.UsageError, match="'sum' or 'mean'"):
        xc.all_reduce(array, op="max" if odd else "sum")


@pytest.mark.own_mpirun
def test_signal_handler_that_raises_after_completion_lets_nobody_drift():
    code, output, _ = run_ranks(
        2,
        """
        world = xc.World(step_timeout=5)
        engine = engine_of(world)
        def handler(*_):
            time.sleep(0.5)
            raise InterruptedError("stop")
        signal.signal(signal.SIGUSR1, handler)
        if world.rank == 0:
            import threading
            threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGUSR1]).start()
        else:
            time.sleep(1.2)
        for _ in range(2):
            try:
                engine.step()
                say(f"rank {world.rank} stepped")
            except InterruptedError:
                say("interrupted")
            except xc.PeerError as error:
                report(error)
        """,
    )
    assert code == 0 and output.count("interrupted") >= 1, output
    assert "rank 0 stepped" not in output and "rank 1 stepped" not in output, output


@pytest.mark.own_mpirun
def test_weights_of_a_torn_step_are_not_given_out():
    _, output, _ = run_ranks(
        2,
        """
        world = xc.World()
        engine = xc.Engine(world, np.ones(30_000_000, "float32"), momentum=0.9, lr=0.1)
        engine.step()
        if world.rank == 1:
            import threading
            threading.Timer(0.003, os.kill, [os.getpid(), signal.SIGKILL]).start()
        try:
            for _ in range(1000):
                engine.step()
        except xc.PeerError as error:
            report(error)
            try:
                engine.master()
                say("settled" if "meeting A" in str(error) else "torn")
            except xc.UsageError as unsettled:
                say(f"refused: {unsettled}")
        time.sleep(1)
        os._exit(0)
        """,
        *SURVIVORS,
    )
    assert "rank 1 died" in output and "torn" not in output, output
    assert "settled" in output or "refused: a rank was lost in the middle of a step" in output, output


def test_differing_tiles_or_momentum_at_construction_are_a_mismatch(world):
    import numpy as np

    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    odd = world.rank == world.size - 1
    for options in ({"tile": 512 + odd}, {"momentum": 0.9 * odd}):
        with pytest.raises(xc.MismatchError, match="tile 512.*tile 513|kernel 0.*kernel 4"):
            xc.Engine(world, np.ones(5000, np.float32), **options)


def test_any_error_of_one_rank_in_its_step_is_an_error_of_all(world):
    import numpy as np

    def inner(lr):
        return lr / (world.rank != world.size - 1)

    engine = xc.Engine(world, np.ones(5), extrapolation="local", inner_lr=0.1)
    with pytest.raises(xc.UsageError, match="ZeroDivisionError"):
        engine.step(inner_lr=inner)
    with pytest.raises(xc.UsageError, match="must be a number"):
        engine.step(lr="x" + "é" * 300, inner_lr=0.1)
    engine.step(lr=0.1)
    engine.close()


@pytest.mark.own_mpirun
@pytest.mark.parametrize("where", ["while others wait", "before a construction"])
def test_uncaught_exception_is_shown_once_and_reaches_all_at_once(where):
    code, output, _ = run_ranks(
        3,
        f"""
        world = xc.World()
        engine = engine_of(world)
        engine.step()
        if world.rank == 1:
            time.sleep(0.5)
            raise ValueError("bad batch")
        since = time.monotonic()
        try:
            engine_of(world) if {where == "before a construction"} else engine.step()
        finally:
            say("soon" if time.monotonic() - since < SOON else "late")
        """,
    )
    assert code != 0 and output.count("soon") == 2, output
    assert output.count("Traceback (most recent call last)") == 1, output
    assert output.count("PeerError: rank 1 ended with ValueError: bad batch") == 2, output


@pytest.mark.own_mpirun
def test_caught_peer_error_carries_the_reason():
    code, output, _ = run_ranks(
        2,
        """
        world = xc.World()
        engine = engine_of(world)
        if world.rank == 0:
            raise KeyError("ключ" * 200)
        try:
            engine.step()
        except xc.PeerError as error:
            say(f"{error.rank} {error.reason[:15]} {len(error.reason.encode())}")
        """,
    )
    assert "0 KeyError: 'ключ 479" in output, output


FATES = {"killed": "SIGKILL", "stopped": "SIGSTOP"}
# What rank 1 does when rank 0 strikes it, and what rank 0 does then; weights are few or so many that a step is a pass.
PLACES = {
    "at rest": """
        engine = engine_of(world)
        engine.step()
        if world.rank == 1:
            time.sleep(60)
        strike(after=0.5)
    """,
    "in a meeting": """
        engine = engine_of(world)
        engine.step()
        if world.rank == 0:
            strike(after=0.5)
    """,
    "inside a pass": """
        engine = xc.Engine(world, np.ones(20_000_000, "float32"), momentum=0.9, lr=0.1)
        engine.step()
        if world.rank == 0:
            threading.Thread(target=strike, args=[0.3]).start()
    """,
}
FATAL = """
    import threading
    world = xc.World(step_timeout=2.0, pass_timeout=2.0)
    pids = world.comm.allgather(os.getpid())

    def strike(after):
        time.sleep(after)
        os.kill(pids[1], signal.{fate})
"""


def script_of(*parts):
    return "\n".join(textwrap.dedent(part) for part in parts)


@pytest.fixture
def nothing_left():
    """No name of ours in /dev/shm after the test that was not there before."""
    before = set(Path("/dev/shm").iterdir())
    yield
    assert not [f for f in set(Path("/dev/shm").iterdir()) - before if "extrapcomm" in f.name]


@pytest.mark.own_mpirun
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fate", FATES)
def test_survivor_of_a_killed_or_stopped_rank_is_told_its_name(nothing_left, fate, place):
    _, output, _ = run_ranks(
        2,
        script_of(
            FATAL.format(fate=FATES[fate]),
            PLACES[place],
            """
            try:
                while True:
                    engine.step()
            except xc.PeerError as error:
                report(error)
            try:
                engine.step()
            except xc.PeerError as error:
                say(f"again {error.rank}")
            if world.team.alive(1):
                os.kill(pids[1], signal.SIGKILL)
            os._exit(0)
            """,
        ),
        *SURVIVORS,
    )
    why = {"killed": "died", "stopped": "did not come in time"}[fate]
    assert f"PeerError rank=1 rank 1 {why}" in output and "again 1" in output, output
    if place == "at rest":
        assert "noticed at meeting A of step 2" in output, output


@pytest.mark.own_mpirun
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fate", FATES)
def test_job_ends_under_the_default_launcher_when_a_rank_is_killed_or_stopped(nothing_left, fate, place):
    """MPI's own ending would wait for a stopped rank; an uncaught PeerError aborts instead."""
    code, output, seconds = run_ranks(
        2,
        script_of(
            FATAL.format(fate=FATES[fate]),
            "say(f'process {os.getpid()}')",
            PLACES[place],
            """
            while True:
                engine.step()
            """,
        ),
    )
    assert code != 0 and seconds < LIMIT / 2, output
    pids = [int(line.split()[1]) for line in output.splitlines() if line.startswith("process ")]
    assert len(pids) == 2 and not any(map(still_runs, pids)), output


def still_runs(pid):
    """Whether the process is there after a moment; one that nobody has waited for yet does not count."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":
            return False
        time.sleep(0.05)
    return True


@pytest.mark.own_mpirun
def test_rank_that_skips_a_step_is_named_by_the_deadline():
    code, output, _ = run_ranks(
        2,
        """
        world = xc.World(step_timeout=1.0)
        engine = engine_of(world)
        try:
            for number in range(3):
                if not (world.rank == 1 and number == 1):
                    engine.step()
            time.sleep(3)
        except xc.PeerError as error:
            report(error)
        """,
    )
    assert code == 0, output
    assert (
        "PeerError rank=1 rank 1 did not come in time; it is stopped, busy elsewhere, or has skipped a call"
        in output
    )
    assert output.count("PeerError") == 1 and "meeting A of step 3" in output, output


@pytest.mark.own_mpirun
def test_rank_in_a_call_that_others_do_not_make_is_an_error_on_all_and_nothing_moves():
    """Calls that do not meet at the same place: only time can tell."""
    code, output, _ = run_ranks(
        2,
        """
        import torch
        calls = {
            "another engine": lambda: other.step(),
            "an array": lambda: xc.all_reduce(array),
            "buffers": lambda: opt.sync_buffers(model),
            "a group": lambda: opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]}),
            "a construction": lambda: engine_of(world),
        }

        def bits():
            weights = [opt.master(i) for i in range(2)] + [p.detach() for p in model.parameters()]
            arrays = [w.numpy() for w in weights] + [other.master(), other.weights, array.view]
            return b"".join(each.tobytes() for each in arrays)

        for name, call in calls.items():
            world = xc.World(step_timeout=2.0, pass_timeout=2.0)
            other, array = engine_of(world), xc.arena_array(5, world=world)
            model = torch.nn.BatchNorm1d(3)
            opt = xc.ExtrapSGD(model.parameters(), lr=0.1, momentum=0.9, inner_lr="lr", world=world)
            for p in model.parameters():
                p.grad = torch.ones(3)
            opt.step()
            before = bits()
            try:
                call() if world.rank else opt.step()
            except (xc.PeerError, xc.CommError):
                say(f"{name}: error, {'untouched' if bits() == before else 'moved'}")
            world.comm.Barrier()
        """,
    )
    for name in ("another engine", "an array", "buffers", "a group", "a construction"):
        assert output.count(f"{name}: error, untouched") == 2, output
    assert code == 0, output


@pytest.mark.own_mpirun
@pytest.mark.parametrize("form", ["with", "finally", "note"])
def test_reason_is_told_in_every_form_of_ending(form):
    body = {
        "with": "with world: raise ValueError('mine')",
        "finally": """
            try: raise ValueError('mine')
            finally: world.close()
            """,
        "note": """
            error = ValueError('mine')
            getattr(error, 'add_note', print)('see the manual')
            raise error
            """,
    }[form]
    code, output, _ = run_ranks(
        2,
        script_of(
            """
            world = xc.World()
            engine = engine_of(world)
            """,
            f"if world.rank == 0:\n{textwrap.indent(textwrap.dedent(body), '    ')}",
            "engine.step()",
        ),
    )
    assert code != 0 and "PeerError: rank 0 ended with ValueError: mine" in output, output
    assert output.count("Traceback (most recent call last)") == 1, output


@pytest.mark.own_mpirun
def test_error_at_a_prompt_does_not_end_the_world():
    session = subprocess.run(
        [sys.executable, "-i", "-c", PRELUDE + "engine = engine_of(xc.World())"],
        input="1/0\nengine.step()\nprint('steps', engine.steps)\n",
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env={n: v for n, v in os.environ.items() if not n.startswith(("PMIX_", "OMPI_COMM", "PMI_"))},
    )
    assert "ZeroDivisionError" in session.stderr and "steps 1" in session.stdout, session


@pytest.mark.own_mpirun
@pytest.mark.parametrize("max_norm", ["None", "1.0"])
def test_rank_that_is_interrupted_while_others_go_on_gives_no_weights_out(max_norm):
    """The handler runs while the last rank comes, so that the others meet and write without this one."""
    _, output, _ = run_ranks(
        2,
        f"""
        world = xc.World(pass_timeout=5)
        engine = xc.Engine(world, np.zeros(4096, "float32"), lr=1.0, max_grad_norm={max_norm})
        engine.grads[:] = 1
        def handler(*_):
            time.sleep(1.5)
            raise InterruptedError("stop")
        if world.rank == 0:
            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, 0.5)
        else:
            time.sleep(1)
        try:
            engine.step()
        except (InterruptedError, xc.PeerError) as error:
            report(error)
            try:
                say(f"weights {{set(engine.master().tolist())}}")
            except xc.UsageError as error:
                say(f"refused {{error}}")
        os._exit(0)
        """,
    )
    assert "InterruptedError" in output, output
    for line in output.splitlines():
        if line.startswith("weights"):
            assert line == "weights {0.0}", output
    if max_norm == "None":
        assert output.count("refused a rank was lost") == 2, output


def test_weights_of_a_torn_step_are_not_given_out_after_another_call_either():
    """Here the step was torn by a function of the user's, before the second pass."""

    def inner(lr):
        if lr > 0.1:
            raise ValueError("not this one")
        return lr

    with xc.World(MPI.COMM_SELF, workers=2) as alone:
        options = {"extrapolation": "local", "inner_lr": inner, "gain": xc.AdaScale()}
        engine = xc.Engine(alone, np.ones(5), lr=0.1, **options)
        for k, worker in enumerate(engine.workers):
            worker.grads[:] = 1 + k
        for wrong in (ValueError, xc.PeerError, xc.PeerError):
            with pytest.raises(wrong):
                engine.step()
            with pytest.raises(xc.UsageError, match="part old and part new"):
                engine.master()
        engine.close()
