# needs: the configuration.   makes: CONFIG, resolved and checked, and functions from names to files.   next: inputs.smk
import json
import operator
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(workflow.basedir).parent))

from anisodiff.data.download import file_state, on_this_machine, scheme, to_fetch
from anisodiff.data.sources import BUILT_IN
from anisodiff.errors import StageError
from anisodiff.experiment import budgets, files, planning
from anisodiff.experiment.config import published_files, resolve
from anisodiff.experiment.config_text import check_text
from anisodiff.experiment.training_seeds import replicated
from anisodiff.storage.files import write_text

try:
    if workflow.is_main_process:
        for file in workflow.configfiles:
            check_text(Path(file))
    CONFIG = resolve(config)
except StageError as error:
    sys.exit(f"anisodiff: {error}")  # one line, on stderr in dry runs too
DATASETS = {name: replicated(dataset) for name, dataset in CONFIG.datasets.items()}
FILES = {name: files.DatasetFiles(name, dataset) for name, dataset in DATASETS.items()}
FETCHED = {files.fetched(url): {"url": url} | hashes for url, hashes in to_fetch(published_files(CONFIG)).items()}
ENVIRONMENT = "../../envs/environment.yaml"
PUBLISHED = os.path.relpath(Path(workflow.basedir).parent / "config/published.csv")


def configured(section):
    """Pattern of the names of a section of any dataset; what is not configured has no rule."""
    names = {name for dataset in DATASETS.values() for name in getattr(dataset, section)}
    return "|".join(map(re.escape, sorted(names))) or "(?!)"


wildcard_constraints:
    dataset="|".join(map(re.escape, DATASETS)),
    run=configured("runs"),
    path=configured("paths"),
    basis=configured("bases"),
    warp=configured("warps"),
    search=configured("searches"),
    tuning=configured("tunings"),
    geometry=configured("geometry"),
    likelihood=configured("likelihoods"),
    plane="|".join(map(re.escape, CONFIG.toy.planes)),
    row="|".join(map(re.escape, CONFIG.toy.rows)),
    method=configured("methods"),
    nfe="[0-9]+",
    first="[0-9]+",
    last="[0-9]+",


def option(name, values):
    """An option of a stage, once for each of these values (a list, or one): a list, which `:q` quotes one by one."""
    values = [values] if isinstance(values, (str, int)) else values
    return [each for value in values for each in (f"--{name}", str(value))]


def setting(name):
    """Function of the wildcards: a setting of the dataset, `sampling.batch`."""
    return lambda wildcards: operator.attrgetter(name)(DATASETS[wildcards.dataset])


def dataset_json(wildcards):
    """What a stage must know of its dataset; the rest of its configuration can change without rerunning it."""
    return DATASETS[wildcards.dataset].space.as_json()


def compute_json():
    """Device, precision and compilation. Threads are not among them: another number of cores reruns nothing."""
    return json.dumps({key: getattr(CONFIG, key) for key in ("device", "dtype", "compile")}, sort_keys=True)


def entry(wildcards, section, key):
    """One entry of a section of the dataset's configuration: that which the wildcard `key` names."""
    return getattr(DATASETS[wildcards.dataset], section)[getattr(wildcards, key)]


def settings_of(section, key, without=()):
    """Function of the wildcards: the JSON of one entry of the dataset's configuration."""
    return lambda wildcards: entry(wildcards, section, key).as_json(without)


def entries_json(section):
    """Function of the wildcards: the JSON of a section as configured, in order: it is that of a table's rows."""
    return lambda wildcards: json.dumps(
        {name: each.model_dump() for name, each in getattr(CONFIG.datasets[wildcards.dataset], section).items()}
    )


def file_of(pattern):
    """Function of the wildcards: the file of a pattern of the dataset."""
    return lambda wildcards: FILES[wildcards.dataset].of(pattern)


def state_of(url):
    """A file_state of a file or a folder of the user's own, so that another one in its place is read anew. Jobs of their
    own, which take it as it is, do without."""
    path = on_this_machine(url)
    return file_state(path) if workflow.is_main_process and path is not None and url not in BUILT_IN else ""


def images_url(wildcards):
    return DATASETS[wildcards.dataset].images.url


def images_source(wildcards):
    """What the images are read from, if it is one file; a folder or a built-in set is no input."""
    url = images_url(wildcards)
    if scheme(url):
        return files.fetched(url)
    # braces are wildcards to Snakemake
    return [url.replace("{", "{{").replace("}", "}}")] if url not in BUILT_IN and Path(url).is_file() else []


def images_options(wildcards):
    """Source, fit, and the hash of what is read where it is."""
    images = DATASETS[wildcards.dataset].images
    source = files.fetched(images.url) if scheme(images.url) else images.url
    options = {"source": source, "transform": images.transform, "resolution": images.resolution}
    if not scheme(images.url):
        options |= images.hashes
    return [each for name, value in options.items() if value is not None for each in option(name, value)]


def features_file(wildcards):
    return files.fetched(DATASETS[wildcards.dataset].features.url)


def reference_statistics(wildcards):
    """The published ones, where the configuration names any."""
    named = DATASETS[wildcards.dataset].reference
    return [] if named is None else files.fetched(named.url)


def features_kept(wildcards):
    """Images of the data whose features are kept: as many as a cell's, or none where cells keep none."""
    sampling = DATASETS[wildcards.dataset].sampling
    return 0 if sampling.keep == "statistics" else sampling.images


def base_file(wildcards):
    return FILES[wildcards.dataset].base


def network_of(section, key, field):
    """Function of the wildcards: the file of the network that an entry of a section names in a field."""
    return lambda wildcards: FILES[wildcards.dataset].network(getattr(entry(wildcards, section, key), field))


def path_of(section, key):
    """Function of the wildcards: the file of the path that an entry of a section names."""
    return lambda wildcards: FILES[wildcards.dataset].path(entry(wildcards, section, key).path)


def basis_of(section, key):
    """Function of the wildcards: the basis that an entry of `paths` or `runs` is on, if it is on one."""
    return lambda wildcards: FILES[wildcards.dataset].basis(entry(wildcards, section, key).subspaces)


def basis_option(wildcards, input):
    return option("basis", input.basis)


def budgets_at(wildcards):
    """Budgets of a method whose seed ranges reach a job's first image."""
    return files.budgets_at(DATASETS[wildcards.dataset], wildcards.method, int(wildcards.first))


def note_lost_cells():
    """Write the note of each manifest with lost cells, or that cannot be read, unless one waits for its job already."""
    for manifest in [Path(each) for dataset in FILES.values() for each in dataset.manifests if Path(each).is_file()]:
        try:
            lost = [str(cell) for cell in files.cells_of(manifest) if not cell.is_file()]
        except StageError:
            lost = ["the manifest itself, which cannot be read"]
        note = files.note_of_lost_cells(manifest)
        noted = note.is_file() and note.stat().st_mtime > manifest.stat().st_mtime
        if lost and not noted:
            write_text(note, "\n".join([f"lost, seen {time.ctime()}", *lost, ""]))


def lost_cells(wildcards):
    note = files.note_of_lost_cells(Path(files.MANIFEST.format(**wildcards)))
    return [str(note)] if note.is_file() else []


if workflow.is_main_process:
    note_lost_cells()


def warp_settings(wildcards):
    """The warp's own settings, with the number of steps of its budget where it is learned per budget."""
    warp = entry(wildcards, "warps", "warp")
    nfe = getattr(wildcards, "nfe", None)
    if nfe:
        warp = warp.changed(steps=budgets.warp_steps(DATASETS[wildcards.dataset], wildcards.warp, int(nfe)))
    return warp.as_json(["seeds"])


def method_inputs(dataset, name, nfes):
    """Network, path and grids of a method."""
    chosen, method = FILES[dataset], DATASETS[dataset].methods[name]
    return {
        "network": chosen.network(method.network),
        "path": chosen.path(method.path),
        "grids": chosen.grids(name, nfes),
    }


def sample_inputs(wildcards, nfes):
    return method_inputs(wildcards.dataset, wildcards.method, nfes)


def tuning_inputs(wildcards):
    """Files of the method that a tuning starts from, its teacher's pairs, and the feature network of its loss."""
    asked = entry(wildcards, "tunings", "tuning")
    return method_inputs(wildcards.dataset, asked.start, asked.nfe) | {
        "pairs": FILES[wildcards.dataset].pairs(wildcards.tuning),
        "features": [] if asked.features is None else files.fetched(asked.features.url),
    }


def figures(wildcards):
    """What the figures show."""
    return FILES[wildcards.dataset].figures(PUBLISHED)


def published_file(wildcards):
    """Values of others, where the configuration names any."""
    return [PUBLISHED] if figures(wildcards).published.methods else []


def figure_inputs(wildcards):
    shown = figures(wildcards)
    return [
        shown.reference,
        *FILES[wildcards.dataset].manifests,
        *shown.paths.values(),
        *(file for file, _ in shown.warps.values()),
        *shown.strips.values(),
        *shown.geometry.values(),
        *shown.convergence.values(),
        *(file for each in shown.trained.values() for file in each.values() if file is not None),
        *published_file(wildcards),
    ]


def download_options(wildcards):
    """Address, hash and lock file of a fetched file."""
    options = FETCHED[files.FETCHED.format(file=wildcards.file)] | {"lock": "config/lock.json"}
    return [each for name, value in options.items() if value is not None for each in option(name, value)]


def download_access(wildcards, threads):
    """Where a file may be taken from, which changes nothing of it: Snakemake remembers no parameter that takes threads,
    so that what is there is not fetched again."""
    mirror = [] if CONFIG.mirror is None else option("mirror", CONFIG.mirror)
    return [*mirror, *(["--offline"] if CONFIG.offline else [])]


def counted():
    """Jobs of every dataset from nothing, as dry runs of Snakemake count them."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(CONFIG.model_dump_json(exclude_unset=True))
        file.flush()
        command = [sys.executable, "-m", "snakemake", "--snakefile", workflow.main_snakefile, "--configfile", file.name]
        found = {}
        for dataset in DATASETS:
            ran = subprocess.run(
                [*command, "--dry-run", "--forceall", "--nolock", "--quiet", "rules", "--", dataset],
                capture_output=True,
                text=True,
            )
            if ran.returncode:
                raise WorkflowError(f"plan: {ran.stderr.strip().splitlines()[-1]}")
            found[dataset] = planning.jobs_of(ran.stdout + ran.stderr)
    return found
