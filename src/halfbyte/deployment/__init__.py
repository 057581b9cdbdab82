"""``deploy``: the files that put a checkpoint into service on Triton, KServe, Kubernetes, podman, compose or RHEL AI.

    subject   what is deployed: its format, size, context, key-value cache
    options   how it is to be deployed, checked before anything is written
    memory    what it needs in memory, with the reckoning
    server    the container that all targets but Triton's start: image, command, arguments, environment
    render    templates (``templates/``) -> text
    triton, kserve, kubernetes, podman, compose, rhel_ai   the files of each target
    run       all of it, into a folder that appears when it is complete

``triton_model`` is not part of the package: its files are copied into a Triton model repository and run there.
"""
