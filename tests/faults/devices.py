"""Faults in work that is spread over devices: placement, threads, forecasts, plans."""

from __future__ import annotations

from . import Fault

PLACEMENT, FLOW = "starflow_core/model/placement.py", "starflow_core/model/flow.py"
RUNS, BESIDE, SAMPLING = (f"starflow_core/solve/{name}.py" for name in ("runs", "beside", "sampling"))
MEMORY, PLANNER = "starflow_core/jobs/memory.py", "starflow_core/jobs/planner.py"
RUN_TESTS, CLI = "tests/core/solve/test_runs.py", "tests/core/cli/test_cli.py::"
CLI_TESTS = f"{CLI}test_several_devices_make_the_same {CLI}test_devices_that_cannot_be_used"
MEMORY_TESTS, PLANNER_TESTS = "tests/core/jobs/test_memory.py", "tests/core/jobs/test_planner.py"

FAULTS = [
    Fault(PLACEMENT, "last = devices[-1]", "last = devices[0]", "all else is on the first device", RUN_TESTS),
    Fault(
        PLACEMENT,
        "halves = 2 if guided else 1",
        "halves = 2",
        "the deep block has two devices without guidance",
        RUN_TESTS,
    ),
    Fault(
        FLOW,
        "weight.to(device), weight.requires_grad",
        "weight, weight.requires_grad",
        "copies share their weights with the original",
        RUN_TESTS,
    ),
    Fault(
        "starflow_core/model/lora.py",
        ".train(layer.training))\n    flow.copy_deep(flow.copies)\n",
        ".train(layer.training))\n",
        "copies of the deep block lack a LoRA",
        RUN_TESTS,
    ),
    Fault(
        "starflow_core/weights/flow.py",
        "    flow.copy_deep(placement.deep)\n",
        "",
        "a flow is loaded onto one device of two",
        RUN_TESTS,
    ),
    Fault(
        RUNS,
        "flow.deep_on(device), self.copies",
        "flow.deep, self.copies",
        "both halves compute with the first device's weights",
        RUN_TESTS,
    ),
    Fault(
        RUNS, "            wait([other])", "            pass", "the other half goes on when one has failed", RUN_TESTS
    ),
    Fault(RUNS, "self.second.submit(carried(act)", "self.second.submit((act)", "a thread has other modes", RUN_TESTS),
    Fault(BESIDE, "            stop.set()", "            pass", "who is ahead isn't stopped", RUN_TESTS),
    Fault(BESIDE, "            making.result()\n", "", "what goes wrong ahead is lost", RUN_TESTS),
    Fault(
        SAMPLING,
        "if self.placement.shallow in self.placement.deep:",
        "if True:",
        "the deep block waits for the shallow ones",
        RUN_TESTS,
    ),
    Fault(
        MEMORY, "half if device in placement.deep else job", "job", "both halves of guidance count twice", MEMORY_TESTS
    ),
    Fault(
        MEMORY,
        'means.cache, item) if "deep" in parts else (0, 0)',
        "means.cache, item)",
        "every device has a cache",
        MEMORY_TESTS,
    ),
    Fault(
        MEMORY,
        "weight_bytes(config, dtype, means.int8, parts, means.mesh)",
        "weight_bytes(config, dtype, means.int8)",
        "every device has all weights",
        MEMORY_TESTS,
    ),
    Fault(
        PLANNER,
        "        if not lacking:\n            first",
        "        if len(lacking) < 2:\n            first",
        "one device too small is passed over",
        PLANNER_TESTS,
    ),
    Fault(
        PLANNER,
        "room = {device: _within(options.budget, memory.free(device)) for",
        "room = {device: memory.free(device) for",
        "a budget isn't each device's",
        PLANNER_TESTS,
    ),
    Fault(
        "starflow_core/cli/settings.py",
        "if len(set(devices)) < len(devices):",
        "if False:",
        "a device may be named twice",
        CLI_TESTS,
    ),
    Fault(
        "starflow_core/cli/settings.py",
        "        placement = self.placement\n",
        "        placement = Placement.on(self.device)\n",
        "--devices is ignored",
        CLI_TESTS,
    ),
]
