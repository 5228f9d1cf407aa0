"""Finetune a text-to-image diffusion model by reinforcement learning: `python launch.py compressibility`.

    config ──► run folder (or its mirror) ──► cluster ──► rewards tried ──► actors ──► training loop ──► LoRA and report

`python launch.py --help` lists experiments and settings. The same command on an existing run goes on with it.
"""

import signal
import sys
from pathlib import Path
from types import FrameType

from actors.cluster import cluster
from actors.driver import Driver, rules
from buffer.errors import RunStopped, full_disk_stops_the_run
from buffer.mirror import Mirror
from buffer.mirroring import Mirroring
from buffer.orders import Plan
from conf.errors import UserError
from conf.load import help_text, load
from conf.prompts import resolve_prompts
from conf.resume import RunLock, check_resume, check_same, save_config
from conf.scale import ask
from conf.schema import Config
from conf.validate import cluster_fits, effective_gpus, validate
from evaluation.record import read_record, record_end
from evaluation.report import write_report
from evaluation.summary import compare, in_words
from monitoring.display import Display
from policy.source import check_model
from policy.stable_diffusion import check_schedule, image_size


def main(arguments: list[str]) -> int:
    """The exit code: 0 when the run is finished or was stopped by Ctrl-C, 2 with a sentence when it cannot go on."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return 0
    try:
        if arguments[0] == "--scale":
            print(ask(Path(arguments[1]) if len(arguments) > 1 else Path(), arguments[2:]))
            return 0
        config = load(arguments)
        validate(config)
        check_model(config.model)
        check_schedule(config.model, config.sampling)
        prompts = resolve_prompts(config.prompts)
        run_dir = Path(config.run.dir) / config.run.name
        with RunLock(run_dir):
            check_resume(run_dir, config, prompts)
            mirror = Mirror.at(config.run.mirror, run_dir) if config.run.mirror is not None else None
            if mirror and mirror.prepare(lambda restored: check_same(restored, config, prompts)):
                print(f"{run_dir} was restored from the mirror {config.run.mirror}")
            mirroring = Mirroring(mirror, rules(config).served)
            with mirroring, full_disk_stops_the_run(run_dir):
                if read_record(run_dir).get("finished") != config.run.batches:
                    train(config, prompts, run_dir, mirroring)
                    return 0
                mirroring.start()
                mirroring.finish()
            print(f"{run_dir} is finished, all {config.run.batches} batches are trained: see {run_dir}/report.html")
            print(f"To train on, give the same command with run.batches={2 * config.run.batches}")
    except (UserError, RunStopped) as reason:
        print(f"launch.py: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("launch.py: stopped at once; the same command goes on from the last recovery point", file=sys.stderr)
        return 130
    return 0


def train(config: Config, prompts: list[str], run_dir: Path, mirroring: Mirroring) -> None:
    """Until the run is finished, is stopped by Ctrl-C, or cannot go on."""
    sizes = config.buffer
    plan = Plan(config.run.seed, tuple(prompts), sizes.batch_size, sizes.order_size, config.evaluation.count)
    with cluster(config) as resources, Display(run_dir.name, config.run.batches) as display:
        ctrl_c = CtrlC()  # after Ray has set its own
        fitted, remarks = effective_gpus(config, resources)
        cluster_fits(fitted, resources)
        for remark in remarks:
            display.say(remark)
        with Driver(fitted, run_dir, plan, mirroring) as driver:
            driver.try_rewards(image_size(config.model), display.say)
            ctrl_c.only_noted = True  # until here there is no batch to finish
            save_config(run_dir, config, prompts)
            mirroring.start()
            driver.start()
            draining = False
            while True:
                news = driver.step()
                display.show(driver.snapshot(news))
                if news.finished or (draining and not news.status["taken_by"]):
                    break
                if ctrl_c.pressed and not draining:
                    display.say(f"{ctrl_c.pressed}: the batch in training is finished first; once more stops at once")
                    driver.drain()
                    draining = True
            driver.record(news)
            folder = driver.save_lora()
    report = write_report(run_dir)
    if news.finished:
        record_end(run_dir, config.run.batches)
    mirroring.finish()
    if news.finished:
        print(in_words(compare(run_dir)))
        print(f"LoRA: {folder}\nreport: {report}")
    else:
        print(f"stopped after {news.status['trained_batches']} batches; the same command goes on from there")


class CtrlC:
    """Ctrl-C or SIGTERM (a spot instance's warning) interrupts; where it says so, the first is only noted."""

    def __init__(self) -> None:
        self.only_noted = False
        self.pressed = ""  # what it was
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.pressed or not self.only_noted:
            raise KeyboardInterrupt
        self.pressed = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
