# needs: the toy's configuration.   makes: processes learned on planes, their table and figures.   next: the reader
TOY_SEEDS = range(CONFIG.toy.seed, CONFIG.toy.seed + CONFIG.toy.seeds)
TOY_FILES = {
    plane: {
        row: [files.TOY_ROW.format(plane=plane, row=row, seed=seed) for seed in TOY_SEEDS] for row in CONFIG.toy.rows
    }
    for plane in CONFIG.toy.planes
}


rule toy:
    """The flexible forward process, learned on a plane with every seed."""
    output:
        expand(files.TOY_ROW, seed=TOY_SEEDS, allow_missing=True),
    log:
        "results/fp-toy/logs/toy/{plane}/{row}.log",
    benchmark:
        "results/fp-toy/benchmarks/toy/{plane}/{row}.tsv"
    conda:
        ENVIRONMENT
    threads: cpus("toy")
    resources:
        **asks("toy"),
    params:
        compute=compute_json(),
        settings=CONFIG.toy.training.as_json(),
        plane=lambda wildcards: CONFIG.toy.planes[wildcards.plane].as_json(),
        row=lambda wildcards: CONFIG.toy.rows[wildcards.row].as_json(),
        seeds=CONFIG.toy.seeds,
        folder=subpath(output[0], parent=True),
    shell:
        "exec python -m anisodiff toy --settings {params.settings:q} --plane {params.plane:q} --row {params.row:q}"
        " --seeds {params.seeds} --output {params.folder:q} --compute {params.compute:q} --threads {threads} >{log:q} 2>&1"


rule toy_report:
    """Rows by plane, over seeds, and their figures."""
    input:
        [each for rows in TOY_FILES.values() for found in rows.values() for each in found],
    output:
        csv=files.TOY_TABLE,
        md=files.TOY_PAGE,
        plots=directory(files.TOY_PLOTS),
    log:
        "results/fp-toy/logs/toy_report.log",
    conda:
        ENVIRONMENT
    params:
        files=json.dumps(TOY_FILES),
        folder=subpath(output.csv, parent=True),
    shell:
        "exec python -m anisodiff toy-report --files {params.files:q} --output {params.folder:q} >{log:q} 2>&1"


rule publish_toy:
    """Table and figures of the toy, copied to where they can be committed, with what made them."""
    input:
        csv=files.TOY_TABLE,
        md=files.TOY_PAGE,
        plots=files.TOY_PLOTS,
    output:
        files.PROVENANCE.format(dataset=files.TOY),
    log:
        "results/fp-toy/logs/publish.log",
    conda:
        ENVIRONMENT
    params:
        settings=CONFIG.toy.as_json(),
        results=subpath(input.csv, parent=True),
        output=subpath(output[0], parent=True),
    shell:
        "exec python -m anisodiff publish --results {params.results:q} --settings {params.settings:q}"
        " --output {params.output:q} {input:q} >{log:q} 2>&1"
