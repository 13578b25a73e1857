"""Faults in batches of the command line."""

from __future__ import annotations

from . import Fault

TESTS = "tests/core/cli/test_batch.py::"
BATCH, FOLDERS, ROWS, WORKERS = (
    f"starflow_core/cli/batch/{name}.py" for name in ("__init__", "folders", "rows", "workers")
)

FAULTS: list[Fault] = [
    # Rows
    Fault(
        ROWS, "vars(defaults).items() if name not in fields}", "vars(defaults).items()}",
        "a row's LoRAs are added to the command's",
        TESTS + "test_options_of_the_command_count_for_rows_that_say_nothing_else",
    ),
    Fault(
        ROWS, "if value is not None}", "}", "null is taken for a text",
        TESTS + "test_options_of_the_command_count_for_rows_that_say_nothing_else",
    ),
    Fault(
        ROWS, "return options[:1] if value else options[1:]", "return options[:1]", "false switches on",
        TESTS + "test_a_row_is_what_generate_makes",
    ),
    Fault(
        ROWS, "lines.setdefault(folder.key(row.name), line)", "lines.setdefault(row.name, line)",
        "two names for one file aren't noticed", TESTS + "test_bad_rows_are_refused_by_line_before_any_work",
    ),
    Fault(
        ROWS, "if len(plan.paths) > 1:", "if False:", "a row makes several results, under other names",
        TESTS + "test_bad_rows_are_refused_by_line_before_any_work",
    ),
    Fault(
        ROWS, "key = args.model, args.text_encoder, args.vae, args.dtype, args.device", "key = args.device",
        "a row's model is taken for that of the first", TESTS + "test_rows_may_name_another_model",
    ),
    Fault(
        ROWS, "raise InputError(f\"{path}, line {line}: {error}\") from None", "raise", "a bad row isn't named",
        TESTS + "test_bad_rows_are_refused_by_line_before_any_work",
    ),
    # Making them
    Fault(
        WORKERS, "for _ in range(1 + self._retries):", "for _ in range(self._retries):", "a try is missing",
        TESTS + "test_a_row_that_fails_once_is_made",
    ),
    Fault(
        WORKERS, "plan = Plan.make(args, self._models.setup(args), keep_text_encoder=True)",
        "plan = Plan.make(args, self._models.setup(args))", "the text encoder is read for every row",
        TESTS + "test_a_row_is_what_generate_makes",
    ),
    Fault(
        WORKERS, "        detach(self._pipeline.flow)\n", "", "LoRAs pile up",
        TESTS + "test_loras_come_and_go_beside_one_model",
    ),
    Fault(
        WORKERS, "        if key != self._key:\n", "        if True:\n", "the model is loaded for every row",
        TESTS + "test_loras_come_and_go_beside_one_model",
    ),
    Fault(
        WORKERS, "means.int8, means.streamed,", "means.streamed,", "rows in 8 bit are made with full weights",
        TESTS + "test_a_row_that_is_fitted_otherwise_has_the_model_loaded_so",
    ),
    Fault(
        WORKERS, "        self._worn = None\n", "", "after a LoRA that fails its place stays empty",
        TESTS + "test_a_lora_that_cannot_be_put_on_leaves_the_others",
    ),
    # Many of them
    Fault(
        BATCH, "rows[processes.rank :: processes.count]", "left[processes.rank :: processes.count]",
        "processes share out what is left while others make it", TESTS + "test_each_process_has_its_rows",
    ),
    Fault(
        BATCH, "    outcomes = processes.gathered(outcomes)\n", "", "a process that is done stops the others",
        TESTS + "test_processes_share_rows_and_wait_for_each_other",
    ),
    Fault(
        BATCH, "        folder.discard(FAILED)\n", "", "an old list of failures stays",
        TESTS + "test_a_row_that_fails_is_listed_and_stops_no_other",
    ),
    Fault(
        BATCH, "[row for row in rows if not folder.has(row.name)]", "rows", "what is there is made again",
        TESTS + "test_what_is_there_is_left_alone",
    ),
    Fault(
        "starflow_core/cli/__init__.py", "isinstance(error, JobsFailed)", "False", "rows that fail look like bad input",
        TESTS + "test_a_row_that_fails_is_listed_and_stops_no_other",
    ),
    # Folders
    Fault(
        FOLDERS, 'part = f"{target}.part"', "part = target", "an upload that stops is taken for a result",
        TESTS + "test_a_folder_of_another_file_system",
    ),
    Fault(
        FOLDERS, "                self._system.rm_file(part)\n", "                pass\n", "parts of uploads stay",
        TESTS + "test_a_folder_of_another_file_system",
    ),
    Fault(
        FOLDERS, 'or ".." in path.parts', "", "results leave the folder",
        TESTS + "test_bad_rows_are_refused_by_line_before_any_work",
    ),
]  # fmt: skip
