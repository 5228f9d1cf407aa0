"""A run from its lock to its report: what `launch.py` starts once the settings are known to be good."""

import signal
from pathlib import Path
from types import FrameType

from actors.cluster import cluster
from actors.driver import Driver
from buffer.run_folder import RunFolder
from buffer.settings import plan_of, rules_of
from common.files import disk_stops_the_run
from conf import scale
from conf.resume import RunLock, check_resume, check_same, save_config
from conf.schema import Config
from conf.validate import cluster_fits, effective_gpus
from evaluation.history import is_over
from evaluation.summary import outcome
from mirror.mirror import Mirror
from mirror.mirroring import Mirroring
from monitoring.display import Display
from policy.check import Checked
from report.record import record_end
from report.report import write_report
from workers.checks import check_run


def run(config: Config, prompts: list[str]) -> None:
    """Begins the run or goes on with it, until it is finished or stopped by Ctrl-C.

    Raises UserError for what the settings alone do not show, RunStopped when it cannot go on.
    """
    checked = check_run(config, prompts)
    run_dir = Path(config.run.dir) / config.run.name
    with RunLock(run_dir):
        check_resume(run_dir, config, prompts)
        mirror = Mirror.at(config.run.mirror, run_dir) if config.run.mirror is not None else None
        if mirror and mirror.prepare(lambda restored: check_same(restored, config, prompts)):
            print(f"{run_dir} was restored from the mirror {config.run.mirror}")
        if (run_dir / scale.REQUEST).exists():
            print(scale.set_aside(run_dir, "it was left from before this start, ask again"))
        mirroring = Mirroring(mirror, rules_of(config).served)
        with mirroring, disk_stops_the_run(run_dir):
            if not (over := is_over(RunFolder(run_dir), config)):
                train(config, prompts, run_dir, mirroring, checked)
                return
            mirroring.start()
            mirroring.finish()
        print(over)


def train(config: Config, prompts: list[str], run_dir: Path, mirroring: Mirroring, checked: Checked) -> None:
    """Until the run is finished, is stopped by Ctrl-C, or cannot go on."""
    with cluster(config) as resources, Display(run_dir.name, config.run.batches) as display:
        ctrl_c = CtrlC()  # after Ray has set its own
        fitted, taken_as_0 = effective_gpus(config, resources)
        cluster_fits(fitted, resources)
        for remark in [*checked.remarks, *taken_as_0]:
            display.say(remark)
        with Driver(fitted, run_dir, plan_of(config, prompts), mirroring) as driver:
            driver.try_rewards(checked.image_size, display.say)
            ctrl_c.only_noted = True  # until here there is no batch to finish
            save_config(run_dir, config, prompts)
            mirroring.start()
            driver.start()
            draining = False
            while True:
                news = driver.step()
                display.show(driver.snapshot(news))
                if news.finished or (news.draining and not news.training):
                    break
                if (driver.publisher.stops or ctrl_c.pressed) and not draining:
                    if ctrl_c.pressed:
                        display.say(f"{ctrl_c.pressed}: a batch in training is finished first; once more stops at once")
                    driver.drain()
                    draining = True
            stopped = driver.publisher.stops
            driver.record(news)
            driver.save_lora()
    report = write_report(run_dir)
    if news.finished:
        record_end(run_dir, config.run.batches)
    mirroring.finish()
    if news.finished:
        print(f"{outcome(run_dir)}\nLoRA: {run_dir / 'lora'}\nreport: {report}")
    elif stopped:
        ended = outcome(run_dir, f"stopped after {news.trained} batches")
        print(f"{stopped}\n{ended}\nLoRA of the best version: {run_dir / 'lora_best'}\nreport: {report}")
    else:
        print(f"stopped after {news.trained} batches; the same command goes on from there")


class CtrlC:
    """Ctrl-C or SIGTERM (a spot instance's warning) interrupts; while `only_noted` is set, the first is only noted."""

    def __init__(self) -> None:
        self.only_noted = False
        self.pressed = ""  # what it was
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.pressed or not self.only_noted:
            raise KeyboardInterrupt
        self.pressed = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
