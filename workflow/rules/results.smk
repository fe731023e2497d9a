# needs: feature statistics, paths, trajectories.   makes: distances, tables, figures.   next: the reader


rule distance:
    """Frechet distance of every cell of a dataset, in one job: the root of the reference covariance is taken once."""
    input:
        reference=files.REFERENCE,
        manifests=lambda wildcards: FILES[wildcards.dataset].manifests,
    output:
        distances=files.DISTANCES,
        left_out=files.LEFT_OUT,
    log:
        "results/{dataset}/logs/distance.log",
    conda:
        ENVIRONMENT
    resources:
        **asks("distance"),
    params:
        images=setting("sampling.images"),
        kind=setting("features.kind"),
    shell:
        "exec python -m anisodiff distance --dataset {wildcards.dataset:q} --reference {input.reference:q}"
        " --images {params.images} --features-kind {params.kind:q} --output {output.distances:q} --left-out {output.left_out:q}"
        " {input.manifests:q} >{log:q} 2>&1"


rule table:
    """The table: tidy CSV, and method by NFE as Markdown and LaTeX; and what it cost."""
    input:
        lambda wildcards: FILES[wildcards.dataset].searches.values(),
        lambda wildcards: FILES[wildcards.dataset].tunings.values(),
        lambda wildcards: sum(FILES[wildcards.dataset].likelihoods.values(), []),
        published_file,
        distances=files.DISTANCES,
        left_out=files.LEFT_OUT,
    output:
        csv=files.TABLE,
        md=files.TABLE_PAGE,
        tex=files.TABLE_TEX,
        metrics=files.METRICS_PAGE,
        cost=files.COST,
        cost_md=files.COST_PAGE,
    log:
        "results/{dataset}/logs/table.log",
    conda:
        ENVIRONMENT
    params:
        # a list, so that the order of the rows is the configuration's
        methods=entries_json("methods"),
        ladder=lambda wildcards: option("ladder", DATASETS[wildcards.dataset].ladder),
        searches=lambda wildcards: json.dumps(FILES[wildcards.dataset].searches),
        likelihoods=lambda wildcards: json.dumps(FILES[wildcards.dataset].likelihoods),
        tunings=lambda wildcards: json.dumps(FILES[wildcards.dataset].tunings),
        published=lambda wildcards: figures(wildcards).published.as_json(),
        folder=subpath(output.csv, parent=True),
    shell:
        "exec python -m anisodiff table --distances {input.distances:q} --left-out {input.left_out:q}"
        " --methods {params.methods:q} --output {params.folder:q}"
        " {params.ladder:q} --searches {params.searches:q} --likelihoods {params.likelihoods:q}"
        " --tunings {params.tunings:q} --published {params.published:q} >{log:q} 2>&1"


rule plots:
    """Every figure of a dataset, SVG and PNG."""
    input:
        figure_inputs,
        table=files.TABLE,
    output:
        directory(files.PLOTS),
    log:
        "results/{dataset}/logs/plots.log",
    conda:
        ENVIRONMENT
    params:
        settings=lambda wildcards: figures(wildcards).model_dump_json(),  # in the configuration's order
    shell:
        "exec python -m anisodiff plot --table {input.table:q} --settings {params.settings:q} --output {output:q}"
        " >{log:q} 2>&1"


rule publish:
    """Tables and figures, copied to where they can be committed, with what made them."""
    input:
        lambda wildcards: FILES[wildcards.dataset].results,
    output:
        files.PROVENANCE,
    log:
        "results/{dataset}/logs/publish.log",
    conda:
        ENVIRONMENT
    params:
        settings=lambda wildcards: CONFIG.datasets[wildcards.dataset].as_json(),
        results=file_of(files.FOLDER),
        files=lambda wildcards: FILES[wildcards.dataset].published,
        output=subpath(output[0], parent=True),
    shell:
        "exec python -m anisodiff publish --results {params.results:q} --settings {params.settings:q}"
        " --output {params.output:q} {params.files:q} >{log:q} 2>&1"
