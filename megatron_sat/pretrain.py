"""One run from its configuration to its end: build, resume, say the plan, train, and leave the files behind.

In the folder of ``--save`` besides the checkpoints: ``config.yaml`` (resolved), ``plan.json``, ``metrics.jsonl``
(unless ``--log-jsonl`` says where) and ``visits.npz`` (how often each neuron was kept).

Exit codes: 0 the run is at its end, or was asked to stop by file or flag; 2 cannot be obeyed; 3 a step that cannot be
trusted (`training.response`); 4 a checkpoint that could not be written; 5 a rank that did not come (`preflight`);
``--requeue-exit-code`` a signal asked it to make room. Anything else is a crash.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sat import cli, distributed, log, plan
from megatron_sat.build import Run, build_run, introduce
from megatron_sat.checkpoint.folder import RELEASE, TRACKER
from megatron_sat.checkpoint.header import Header, changes
from megatron_sat.checkpoint.resume import Checkpoint, LoadConfig, Resumed, load_checkpoint, open_checkpoint
from megatron_sat.checkpoint.saving import NotSaved
from megatron_sat.data.batch import Batch
from megatron_sat.engines.base import StepResult
from megatron_sat.model.flops import step_flops, whole
from megatron_sat.preflight import start as preflight
from megatron_sat.rehearsal.rehearse import rehearsal
from megatron_sat.training.checkpoints import Checkpoints
from megatron_sat.training.guard import Finding, Guard
from megatron_sat.training.imported import check_import
from megatron_sat.training.loop import Extent, Moments, Progress, train
from megatron_sat.training.metrics import Meter, StepFigures, Totals, open_sinks
from megatron_sat.training.reading import Reader, order_of
from megatron_sat.training.requests import Requests, Wish
from megatron_sat.training.response import BadStep, Response, Samples, worst_micro_batch
from megatron_sat.training.state import restore_choices, whole_choices, whole_visits

BAD_STEP, NOT_SAVED = 3, 4
"""Exit codes of a run that a step ended, or a checkpoint that could not be written."""
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
    if code := preflight.join(config, launch, cuda=cuda):
        return code
    try:
        session = Session(build_run(config))
    except ValueError as error:  # the user's to mend
        if launch.local_rank == 0:  # one line a host: what is wrong may be wrong on one of them alone
            sys.stderr.write(f"error: {error}\n")
        distributed.leave(patience_seconds=PATIENCE_SECONDS)
        return cli.USAGE_ERROR
    try:
        with distributed.in_turn(launch):
            code = session.train()
    except (BadStep, NotSaved) as problem:
        if launch.rank == 0:
            sys.stderr.write(f"error: {problem}\n")
        distributed.leave(patience_seconds=PATIENCE_SECONDS)
        return BAD_STEP if isinstance(problem, BadStep) else NOT_SAVED
    distributed.leave()
    return code


class Session:
    """A built run at work: what happens at each moment of the loop, and where it is written."""

    def __init__(self, run: Run) -> None:
        """Resume where there is something to resume. Raises ValueError for a checkpoint that does not fit."""
        self.run, self.config = run, run.config
        self.meter = Meter(num_devices=dist.get_world_size())
        training = self.config.training
        self.reader = Reader(
            layout=run.layout, device=run.device, micro_batch_size=training.micro_batch_size, grain=run.grain
        )
        self.requests = Requests(self.folder if dist.get_rank() == 0 else None)
        self.wish = Wish.NOTHING
        introduce(run)
        self.guard = Guard(self.config.guard)
        self.response = Response(self.guard, engine=run.engine, controller=run.controller, roll_back=self._rolled_back)
        self.checkpoints = Checkpoints(self.config.checkpoint, engine=run.engine, layout=run.layout)
        self.progress = self._resumed()
        run.course.start(self.progress.iteration + 1)
        plan.show(run.plan)
        self.sinks = open_sinks(
            jsonl=self.config.logging.log_jsonl,
            tensorboard=self.config.logging.tensorboard_dir,
            resume_step=self.progress.iteration,
            beside=self._leave_settings,
        )
        samples = training.eval_iters * training.global_batch_size
        self.valid = self.reader.evaluations(run.datasets.valid, max_samples=samples, multiple=self._passed_on)

    def train(self) -> int:
        """To the end, or to an exit condition. Returns the exit code. Raises BadStep where a step ends the run."""
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
            should_save=lambda: self.wish is Wish.SAVE,
            begin=self.run.course.begin_step,
        )
        with self.requests.listening(training.listens_to), self.checkpoints.kept():
            self.progress = train(
                self.run.engine,
                self.run.controller,
                progress=self.progress,
                extent=extent,
                batches=self.batches,
                moments=moments,
            )
        asked = self.wish is Wish.REQUEUE and self.progress.iteration < training.train_iters
        return training.requeue_exit_code if asked else 0

    def batches(self, consumed_samples: int) -> Iterator[Batch]:
        """This rank's training micro-batches from there on."""
        dataset, workers = self.run.datasets.train, self.config.data.num_workers
        assert dataset is not None
        return self.reader.train(dataset, consumed_samples=consumed_samples, num_workers=workers)

    def stepped(self, step: int, result: StepResult, seconds: float) -> None:
        """Enter the step's figures, and agree on all that the ranks must do alike.

        One collective carries rank 0's time, so that all ranks carry the same totals, what each rank was asked for,
        what it finds wrong, and whether it still writes. Raises BadStep or NotSaved where the run ends.
        """
        run, clock = self.run, seconds if dist.get_rank() == 0 else 0.0
        seconds, wish, finding, writing = distributed.highest(
            [clock, self.requests.look(), self.guard.found(result), self.checkpoints.writing], device=run.device
        )
        self.wish = Wish(int(wish))
        self.response.settle(step, finding=Finding(int(finding)), result=result, where=lambda: self._culprits(step))
        planned, length = run.plan.at(step), self.config.model.seq_length
        assert run.datasets.train is not None
        tokens = self.reader.positions(run.datasets.train, samples=self._samples(step), seq_length=length)
        share = tokens / (self.config.training.global_batch_size * length)
        self.meter.add(
            StepFigures(
                step=step,
                loss=result.loss,
                grad_norm=result.grad_norm,
                learning_rate=result.learning_rate,
                skipped=result.skipped,
                seconds=seconds,
                tokens=tokens,
                nominal_rate=float(planned.rung.rate),
                omission_rates=run.controller.omission_rates(step),
                executed_flops=planned.flops * share,
                dense_flops=step_flops(run.shape, whole(run.shape), tokens=tokens),
            )
        )
        if not writing:
            self.checkpoints.finish()

    def log(self) -> None:
        record = self.meter.record()
        for sink in self.sinks:
            sink.record(record)

    def evaluate(self, step: int) -> None:
        """The dense loss of every validation domain."""
        losses = {
            name: self.run.engine.evaluate(self.reader.cut(batches), num_micro_batches=len(batches)).loss
            for name, batches in self.valid.items()
        }
        for sink in self.sinks if losses else ():
            sink.evaluation(step, losses, elapsed_seconds=self.meter.totals.elapsed_seconds)

    def save(self, progress: Progress) -> None:
        """A checkpoint, and the visits, under ``--save``."""
        if self.folder is None:
            return
        run = self.run
        self.checkpoints.save(
            Header(
                iteration=progress.iteration,
                consumed_train_samples=progress.consumed_samples,
                tokenizer=run.tokenizer.fingerprint,
                data=self._order,
                config=self.config.settings,
                extra={"totals": self.meter.totals.state(), "guard": self.guard.state()},
            ),
            tensors=whole_choices(run.controller.selectors, layout=run.layout) | run.course.state(),
            visits=whole_visits(run.controller.selectors, layout=run.layout),
            keep_all=self.guard.suspicious,
        )

    def should_stop(self, minutes: float) -> bool:
        """Whether someone asked for it, or ``--exit-duration-in-mins`` has passed, by rank 0's clock."""
        if self.wish >= Wish.STOP:
            log.say(f"asked to stop by {'signal' if self.wish is Wish.REQUEUE else 'file'}: saving and ending")
            return True
        limit = self.config.training.exit_duration_in_mins
        if limit is None:
            return False
        (passed,) = distributed.highest([minutes if dist.get_rank() == 0 else 0.0], device=self.run.device)
        return passed > limit

    # -- steps that cannot be trusted

    def _samples(self, step: int) -> range:
        """Those of a step of this process, in the global order."""
        batch = self.config.training.global_batch_size
        first = self.progress.consumed_samples + (step - 1 - self.progress.iteration) * batch
        return range(first, first + batch)

    def _culprits(self, step: int) -> str:
        datasets = self.run.datasets
        assert datasets.train is not None
        return worst_micro_batch(
            self.run.engine,
            layout=self.run.layout,
            samples=Samples(
                dataset=datasets.train,
                names={holding.prefix: holding.name for holding in datasets.survey.train},
                micro_batch_size=self.config.training.micro_batch_size,
                dp_size=self.run.layout.dp_size,
            ),
            first=self._samples(step).start,
        )

    def _rolled_back(self) -> int | None:
        """Put the newest checkpoint of this run back into the engine; its step, or None where there is none yet."""
        self.checkpoints.finish()
        if self.checkpoints.newest is None:
            return None
        root, step = self.checkpoints.newest
        resumed = self._load(open_checkpoint(root, step=step), LoadConfig())
        restore_choices(self.run.controller.selectors, saved=resumed.tensors, layout=self.run.layout)
        self.run.course.restore(resumed.tensors)
        return resumed.iteration

    # -- where it comes from

    @property
    def _order(self) -> dict[str, Any]:
        training, data = self.config.training, self.config.data
        return order_of(self.run.datasets, training=training, seq_length=data.seq_length, seed=data.seed)

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
        how = LoadConfig(
            finetune=checkpoint.finetune, no_load_optim=not checkpoint.load_optim, no_load_rng=not checkpoint.load_rng
        )
        resumed = self._load(opened, how)
        if opened.header is not None and not checkpoint.finetune:
            for key, before, now in changes(opened.header.config, now=self.config.settings, prefix="sat_"):
                log.say(f"note: {key} was {before} in the checkpoint's run and is {now} from here on")
        restore_choices(run.controller.selectors, saved=resumed.tensors, layout=run.layout)
        run.course.restore(resumed.tensors)
        self.meter.totals = Totals(**resumed.extra.get("totals", {}))
        self.guard.restore(resumed.extra.get("guard", {}))
        if resumed.iteration:
            self.checkpoints.newest = (root, resumed.iteration)
        log.say(f"resumed from {opened.folder} at step {resumed.iteration}")
        if opened.folder.name == RELEASE:
            self._check_import(root)
        return Progress(iteration=resumed.iteration, consumed_samples=resumed.consumed_train_samples)

    def _load(self, opened: Checkpoint, how: LoadConfig) -> Resumed:
        """Into the engine; collective. Raises ValueError where the checkpoint does not fit."""
        run, token = self.run, self.run.tokenizer.fingerprint
        return load_checkpoint(
            opened, trainer=run.engine, layout=run.layout, tokenizer=token, data=self._order, config=how
        )

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

    # -- where things go

    @property
    def folder(self) -> Path | None:
        """The folder of ``--save``."""
        return None if self.config.checkpoint.save is None else Path(self.config.checkpoint.save)

    def _leave_settings(self) -> None:
        """Write down what this run is, on one rank."""
        if self.folder is not None:
            cli.save_resolved(self.config, self.folder / "config.yaml")
            (self.folder / "plan.json").write_text(json.dumps(self.run.plan.as_dict(), indent=1) + "\n")
