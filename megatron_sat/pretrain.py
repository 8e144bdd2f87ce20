"""One run from its configuration to its end: build, resume, say the plan, train, and leave the files behind.

In the folder of ``--save`` besides the checkpoints: ``config.yaml`` (resolved), ``plan.json``, ``metrics.jsonl``
(unless ``--log-jsonl`` says where) and ``visits.npz`` (how often each neuron was kept).
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sat import cli, distributed, log, plan
from megatron_sat.build import Run, build_run, introduce
from megatron_sat.checkpoint.folder import RELEASE, TRACKER
from megatron_sat.checkpoint.header import Header, plain
from megatron_sat.checkpoint.resume import LoadConfig, load_checkpoint, open_checkpoint, save_checkpoint
from megatron_sat.data.batch import Batch, EvaluationBatches, build_train_iterator, cut_for_context_parallel
from megatron_sat.engines.base import StepResult
from megatron_sat.model.flops import step_flops, whole
from megatron_sat.rehearsal.rehearse import rehearsal
from megatron_sat.training.imported import check_import
from megatron_sat.training.loop import Extent, Moments, Progress, train
from megatron_sat.training.metrics import Console, JsonLines, Meter, Sink, StepFigures, TensorBoard, Totals
from megatron_sat.training.state import restore_choices, whole_choices, whole_visits
from megatron_sat.training.visits import save_visits

PATIENCE_SECONDS = 10.0
"""How long a rank that must give up waits for the others to say why, before it ends and takes them along."""


def main(argv: Sequence[str]) -> int:
    """Run what the command line asks for. Returns the exit code; 2 for what cannot be obeyed, said in one line."""
    launch, cuda = distributed.read_launch(), torch.cuda.is_available()
    code, argv = rehearsal(argv, world_size=launch.world_size, speaks=launch.rank == 0)
    if code is not None:
        return code
    try:
        config = cli.parse(argv, world_size=launch.world_size, cuda=cuda, speaks=launch.rank == 0)
    except cli.ParsedExit as asked:
        return int(asked.code or 0)
    distributed.join(launch, backend=config.parallel.backend, timeout_minutes=config.parallel.timeout_minutes)
    try:
        session = Session(build_run(config))
    except ValueError as error:  # the user's to mend
        if launch.local_rank == 0:  # one line a host: what is wrong may be wrong on one of them alone
            sys.stderr.write(f"error: {error}\n")
        distributed.leave(patience_seconds=PATIENCE_SECONDS)
        return cli.USAGE_ERROR
    session.train()
    distributed.leave()
    return 0


class Session:
    """A built run at work: what happens at each moment of the loop, and where it is written."""

    def __init__(self, run: Run) -> None:
        """Resume where there is something to resume. Raises ValueError for a checkpoint that does not fit."""
        self.run, self.config = run, run.config
        self.meter = Meter(num_devices=dist.get_world_size())
        introduce(run)
        self.progress = self._resumed()
        plan.show(run.plan)
        self.sinks = self._open_sinks()
        self.valid = self._evaluations(run.datasets.valid)

    def train(self) -> None:
        """To the end, or to an exit condition."""
        training, logging, checkpoint = self.config.training, self.config.logging, self.config.checkpoint
        extent = Extent(
            train_iters=training.train_iters,
            num_micro_batches=training.num_micro_batches,
            global_batch_size=training.global_batch_size,
            log_interval=logging.log_interval,
            eval_interval=training.eval_interval,
            save_interval=checkpoint.save_interval,
            packs=self.config.weights == "compact",
            exit_interval=training.exit_interval,
            exit_duration_minutes=training.exit_duration_in_mins,
        )
        moments = Moments(
            stepped=self.stepped,
            log=self.log,
            evaluate=self.evaluate,
            save=self.save,
            should_stop=self.should_stop,
        )
        self.progress = train(
            self.run.engine,
            self.run.controller,
            progress=self.progress,
            extent=extent,
            batches=self.batches,
            moments=moments,
        )

    def batches(self, consumed_samples: int) -> Iterator[Batch]:
        """This rank's training micro-batches from there on, cut for context parallelism."""
        layout = self.run.layout
        assert self.run.datasets.train is not None
        read = build_train_iterator(
            self.run.datasets.train,
            micro_batch_size=self.config.training.micro_batch_size,
            dp_rank=layout.dp_rank,
            dp_size=layout.dp_size,
            consumed_samples=consumed_samples,
            num_workers=self.config.data.num_workers,
            device=self.run.device,
        )
        return (cut_for_context_parallel(b, cp_rank=layout.cp_rank, cp_size=layout.cp_size) for b in read)

    def stepped(self, step: int, result: StepResult, seconds: float) -> None:
        """Enter the step's figures; the time is rank 0's, so that all ranks carry the same totals."""
        run = self.run
        planned = run.plan.at(step)
        tokens = self.config.training.global_batch_size * self.config.model.seq_length
        self.meter.add(
            StepFigures(
                step=step,
                loss=result.loss,
                grad_norm=result.grad_norm,
                learning_rate=result.learning_rate,
                skipped=result.skipped,
                seconds=self._of_rank_0(seconds),
                tokens=tokens,
                nominal_rate=float(planned.rung.rate),
                omission_rates=run.controller.omission_rates(step),
                executed_flops=planned.flops,
                dense_flops=step_flops(run.shape, whole(run.shape), tokens=tokens),
            )
        )

    def log(self) -> None:
        record = self.meter.record()
        for sink in self.sinks:
            sink.record(record)

    def evaluate(self, step: int) -> None:
        """The dense loss of every validation domain."""
        losses = {
            name: self.run.engine.evaluate(self._cut(batches), num_micro_batches=len(batches)).loss
            for name, batches in self.valid.items()
        }
        for sink in self.sinks if losses else ():
            sink.evaluation(step, losses, elapsed_seconds=self.meter.totals.elapsed_seconds)

    def save(self, progress: Progress) -> None:
        """A checkpoint, and the visits, under ``--save``."""
        if self.folder is None:
            return
        run, checkpoint = self.run, self.config.checkpoint
        save_checkpoint(
            self.folder,
            trainer=run.engine,
            header=Header(
                iteration=progress.iteration,
                consumed_train_samples=progress.consumed_samples,
                tokenizer=run.tokenizer.fingerprint,
                data=self._order,
                config=self.config.settings,
                extra={"totals": self.meter.totals.state()},
            ),
            tensors=whole_choices(run.controller.selectors, layout=run.layout),
            layout=run.layout,
            with_optimizer=checkpoint.save_optim,
            with_rng=checkpoint.save_rng,
            keep_last=checkpoint.save_keep_last,
        )
        visits = whole_visits(run.controller.selectors, layout=run.layout)
        if dist.get_rank() == 0:
            save_visits(self.folder / "visits.npz", visits, steps=progress.iteration)
            log.say(f"step {progress.iteration:>6} | saved to {self.folder}")

    def should_stop(self, minutes: float) -> bool:
        """Whether ``--exit-duration-in-mins`` has passed, by rank 0's clock."""
        limit = self.config.training.exit_duration_in_mins
        if limit is None:
            return False
        return self._of_rank_0(minutes) > limit

    def _of_rank_0(self, number: float) -> float:
        told = torch.tensor([number], dtype=torch.float64, device=self.run.device)
        dist.broadcast(told, src=0)
        return told.item()

    # -- where it comes from

    @property
    def _order(self) -> dict[str, Any]:
        """What decides which sample comes when; an exact resume needs it unchanged. The digest covers the rest."""
        training, data = self.config.training, self.config.data
        return {
            "--global-batch-size": training.global_batch_size,
            "--train-iters x --global-batch-size": training.train_iters * training.global_batch_size,
            "--seq-length": data.seq_length,
            "--seed": data.seed,
            "shares": {holding.name: holding.share for holding in self.run.datasets.survey.train},
            "order": self.run.datasets.order,
        }

    def _resumed(self) -> Progress:
        """Load what ``--load`` names, if there is something. Raises ValueError where it does not fit."""
        checkpoint, run = self.config.checkpoint, self.run
        if checkpoint.load is None:
            return Progress()
        root = Path(checkpoint.load)
        must_be_there = checkpoint.exit_on_missing_checkpoint or checkpoint.finetune or checkpoint.ckpt_step is not None
        if not (root / TRACKER).exists() and not must_be_there:
            log.say(f"{root} holds no checkpoint: this run starts afresh")
            return Progress()
        opened = open_checkpoint(root, step=checkpoint.ckpt_step)
        resumed = load_checkpoint(
            opened,
            trainer=run.engine,
            layout=run.layout,
            tokenizer=run.tokenizer.fingerprint,
            data=self._order,
            config=LoadConfig(
                finetune=checkpoint.finetune,
                no_load_optim=not checkpoint.load_optim,
                no_load_rng=not checkpoint.load_rng,
            ),
        )
        if opened.header is not None and not checkpoint.finetune:
            self._say_what_changed(opened.header.config)
        restore_choices(run.controller.selectors, saved=resumed.tensors, layout=run.layout)
        self.meter.totals = Totals(**resumed.extra.get("totals", {}))
        log.say(f"resumed from {opened.folder} at step {resumed.iteration}")
        if opened.folder.name == RELEASE:
            self._check_import(root)
        return Progress(iteration=resumed.iteration, consumed_samples=resumed.consumed_train_samples)

    def _check_import(self, root: Path) -> None:
        """Say the loss of an imported model beside Hugging Face's. Raises ValueError where they are apart."""
        training, transformer = self.config.training, self.config.transformer
        line = check_import(
            root,
            engine=self.run.engine,
            layout=self.run.layout,
            device=self.run.device,
            seq_length=self.config.model.seq_length,
            micro_batch_size=training.micro_batch_size,
            num_micro_batches=self._passed_on,
            dtype=transformer["params_dtype"],
            override=self.config.checkpoint.allow_first_loss_apart,
        )
        if line is not None:
            log.say(line)

    @property
    def _passed_on(self) -> int:
        """Micro-batches that an interleaved pipeline passes on at a time; 1 without one."""
        if self.config.parallel.virtual_pipeline is None:
            return 1
        return self.config.transformer.get("microbatch_group_size_per_vp_stage") or self.config.parallel.pipeline

    def _say_what_changed(self, before: Mapping[str, Any]) -> None:
        """The method's settings that a resumed run changes: allowed, and worth a line each."""
        now = plain(self.config.settings)
        for key in sorted({*before, *now}):
            if key.startswith("sat_") and before.get(key) != now.get(key):
                log.say(f"note: {key} was {before.get(key)} in the checkpoint's run and is {now.get(key)} from here on")

    # -- where things go

    @property
    def folder(self) -> Path | None:
        """The folder of ``--save``."""
        return None if self.config.checkpoint.save is None else Path(self.config.checkpoint.save)

    def _open_sinks(self) -> list[Sink]:
        """Rank 0's console and files; none elsewhere. Raises ValueError on all ranks for what cannot be written."""
        sinks: list[Sink] = []
        problem: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                sinks = self._files()
            except OSError as error:
                what = f"what a run leaves behind must be writable, {error.filename} is not: {error.strerror}"
                problem[0] = f"{what}; choose another --save, --log-jsonl or --tensorboard-dir"
            except ValueError as error:
                problem[0] = str(error)
        dist.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise ValueError(problem[0])
        return sinks

    def _files(self) -> list[Sink]:
        """On one rank: what the run writes to, earlier figures after the resumed step taken out."""
        logging, step = self.config.logging, self.progress.iteration
        sinks: list[Sink] = [Console()]
        if logging.log_jsonl is not None:
            sinks.append(JsonLines(Path(logging.log_jsonl), resume_step=step))
        if logging.tensorboard_dir is not None:
            sinks.append(TensorBoard(Path(logging.tensorboard_dir), resume_step=step))
        if self.folder is not None:
            cli.save_resolved(self.config, self.folder / "config.yaml")
            (self.folder / "plan.json").write_text(json.dumps(self.run.plan.as_dict(), indent=1) + "\n")
        return sinks

    def _evaluations(self, sets: dict) -> dict[str, EvaluationBatches]:
        """By domain, what an evaluation reads: ``--eval-iters`` global batches, or all where there are fewer."""
        training, layout = self.config.training, self.run.layout
        return {
            name: EvaluationBatches(
                dataset,
                micro_batch_size=training.micro_batch_size,
                dp_rank=layout.dp_rank,
                dp_size=layout.dp_size,
                max_samples=training.eval_iters * training.global_batch_size,
                num_workers=0,
                device=self.run.device,
                multiple=self._passed_on,
            )
            for name, dataset in sets.items()
            if training.eval_iters
        }

    def _cut(self, batches: EvaluationBatches) -> Iterator[Batch]:
        layout = self.run.layout
        return (cut_for_context_parallel(b, cp_rank=layout.cp_rank, cp_size=layout.cp_size) for b in batches)
