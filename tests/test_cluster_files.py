"""What stands in `cluster/` exists in the code: versions, names, commands, keys, deployments, enough CPUs."""

import importlib
import importlib.resources
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve import Deployment
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import DeploymentSchema, RayActorOptionsSchema, ServeApplicationSchema, ServeDeploySchema

import taskspec
from serve.arguments import ServeArgs
from taskspec.config import Config, load_config
from taskspec.train.launch import needed_cpus

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
KUBERNETES = ("raycluster.yaml", "rayjob.yaml", "rayservice.yaml")
JOBS = ("download", "prepare", "mine", "train", "index", "evaluate", "sweep", "pipeline", "quickstart")

# The fields of ray.io/v1 in KubeRay 1.6 that a spec here may use; its API server drops or refuses unknown ones.
CLUSTER_FIELDS = {
    "authOptions",
    "autoscalerOptions",
    "enableInTreeAutoscaling",
    "headGroupSpec",
    "rayVersion",
    "workerGroupSpecs",
}
FIELDS = {
    "RayCluster": CLUSTER_FIELDS,
    "RayJob": {
        "backoffLimit",
        "entrypoint",
        "rayClusterSpec",
        "shutdownAfterJobFinishes",
        "submissionMode",
        "ttlSecondsAfterFinished",
    },
    "RayService": {"excludeHeadPodFromServeSvc", "rayClusterConfig", "serveConfigV2"},
}
CLUSTER_SPEC = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
WORKER_FIELDS = {"groupName", "maxReplicas", "minReplicas", "rayStartParams", "replicas", "template"}


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def cluster_spec(name: str) -> dict[str, Any]:
    manifest = read(name)
    spec = manifest["spec"]
    return spec[CLUSTER_SPEC[manifest["kind"]]] if manifest["kind"] in CLUSTER_SPEC else spec


def groups(name: str) -> list[dict[str, Any]]:
    spec = cluster_spec(name)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return only


def commands() -> Iterator[tuple[str, str]]:
    """Every `python -m jobs.…` of the cluster's files, of the presets' comments too: (file, command)."""
    for path in [*sorted(CLUSTER.iterdir()), *sorted((ROOT / "jobs/configs").glob("*.yaml"))]:
        for command in re.findall(r"python -m (jobs\.\w+[^#`\n]*)", path.read_text()):
            yield path.name, command.strip()


def parse(command: str) -> Config:
    """The configuration that a command resolves to. A configuration of the reader's stands for the template."""
    module, *words = shlex.split(command)
    arguments = importlib.import_module(module).build_parser().parse_args(words)
    source = "own-tasks" if arguments.config == "my-tasks.yaml" else arguments.config
    return load_config(source, arguments.overrides)


def version_of(package: str) -> str:
    (version,) = re.findall(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return version


def test_every_file_names_the_tested_ray() -> None:
    ray = version_of("ray")
    assert f"ARG RAY_VERSION={ray}\n" in (CLUSTER / "Dockerfile").read_text()
    assert {cluster_spec(name)["rayVersion"] for name in KUBERNETES} == {ray}


def test_every_file_names_the_image_of_this_version() -> None:
    image = f"taskspec:{taskspec.__version__}"
    assert {container(group)["image"] for name in KUBERNETES for group in groups(name)} == {image}
    assert read("aws.yaml")["docker"]["image"] == image
    named = [
        found for path in CLUSTER.iterdir() for found in re.findall(r"(?<![\w/-])taskspec:[\w.-]*\d", path.read_text())
    ]
    assert set(named) == {image}


def test_the_image_copies_what_exists_and_runs_the_tested_packages() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[2:-1]]
    assert {"taskspec", "jobs", "serve", "constraints.txt"} <= set(copied)
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text()
    assert all((ROOT / name).exists() and f"!{name}\n" in ignored for name in copied)
    assert all("-c constraints.txt" in line for line in lines if "pip install" in line)
    assert [line for line in lines if line.startswith("USER")] == ["USER ray"]


@pytest.mark.parametrize("job", JOBS)
def test_every_job_has_a_parser_and_runs_by_arguments(job: str) -> None:
    module = importlib.import_module(f"jobs.{job}")
    assert callable(module.run)
    assert module.build_parser().format_help()


@pytest.mark.parametrize(("file", "command"), list(commands()))
def test_every_command_parses_and_its_keys_are_known(file: str, command: str) -> None:
    parse(command)


def test_commands_stand_where_the_test_looks() -> None:
    assert {"README.md", "rayjob.yaml", "kilt.yaml", "own-tasks.yaml"} <= {file for file, _ in commands()}


@pytest.mark.parametrize("name", KUBERNETES)
def test_a_manifest_has_only_fields_that_kuberay_knows(name: str) -> None:
    manifest = read(name)
    assert manifest["apiVersion"] == "ray.io/v1"
    assert manifest["metadata"].keys() <= {"name", "generateName"}
    assert manifest["spec"].keys() <= FIELDS[manifest["kind"]]
    spec = cluster_spec(name)
    assert spec.keys() <= CLUSTER_FIELDS
    assert spec["headGroupSpec"].keys() == {"rayStartParams", "template"}
    assert all(group.keys() == WORKER_FIELDS for group in spec["workerGroupSpecs"])


@pytest.mark.parametrize("name", KUBERNETES)
def test_a_cluster_takes_the_token_of_one_secret(name: str) -> None:
    assert cluster_spec(name)["authOptions"] == {"mode": "token", "secretName": "taskspec-ray-token"}
    assert "secret generic taskspec-ray-token --from-literal=auth_token=" in (CLUSTER / "README.md").read_text()


@pytest.mark.parametrize("name", KUBERNETES)
def test_a_pod_asks_for_what_it_may_use(name: str) -> None:
    for group in groups(name):
        resources = container(group)["resources"]
        assert resources["requests"] == resources["limits"]
        assert {"cpu", "memory"} <= resources["limits"].keys()
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"]
        # The operator refuses start parameters that are numbers.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    names = [group["groupName"] for group in cluster_spec(name)["workerGroupSpecs"]]
    assert len(names) == len(set(names))
    for group in cluster_spec(name)["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def workers_of(name: str, resource: str, replicas: str) -> float:
    """What the worker pods of a manifest have together."""
    return sum(
        group[replicas] * float(container(group)["resources"]["limits"].get(resource, 0))
        for group in cluster_spec(name)["workerGroupSpecs"]
    )


def test_the_training_job_fits_its_cluster_with_its_data() -> None:
    config = parse(read("rayjob.yaml")["spec"]["entrypoint"].removeprefix("python -m "))
    assert needed_cpus(config) <= workers_of("rayjob.yaml", "cpu", "minReplicas")
    assert config.train.workers == workers_of("rayjob.yaml", "nvidia.com/gpu", "minReplicas")


def test_the_standing_clusters_can_grow_to_hold_the_kilt_preset() -> None:
    config = load_config("kilt")
    assert needed_cpus(config) <= workers_of("raycluster.yaml", "cpu", "maxReplicas")
    assert config.train.workers <= workers_of("raycluster.yaml", "nvidia.com/gpu", "maxReplicas")
    nodes = read("aws.yaml")["available_node_types"].values()
    assert needed_cpus(config) <= sum(node.get("max_workers", 0) * node["resources"]["CPU"] for node in nodes)
    assert config.train.workers <= sum(node.get("max_workers", 0) * node["resources"].get("GPU", 0) for node in nodes)


def test_ray_knows_every_key_of_the_aws_file() -> None:
    config = read("aws.yaml")
    schema = importlib.resources.files("ray.autoscaler").joinpath("ray-schema.json").read_text()
    jsonschema.validate(config, json.loads(schema))
    assert config["head_node_type"] in config["available_node_types"]
    # The launcher fills what is left out with set-up of its own, which installs another Ray.
    assert config["setup_commands"] == config["head_setup_commands"] == config["worker_setup_commands"] == []
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["/home/ray/.ray"] == "~/.ray"


def test_serve_accepts_its_file_and_the_builder_its_arguments() -> None:
    (application,) = ServeDeploySchema.model_validate(read("serve.yaml")).applications
    assert application.import_path == "serve.app:build"
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    arguments = ServeArgs.model_validate(application.args)
    encoder = {each.name: each for each in application.deployments}["Encoder"]
    assert arguments.threads == encoder.ray_actor_options.num_cpus
    assert arguments.shard_threads == arguments.shard_cpus


def test_serve_knows_every_key_of_its_file() -> None:
    file = read("serve.yaml")  # Serve itself passes over unknown keys in silence
    (application,) = file["applications"]
    assert file.keys() <= ServeDeploySchema.model_fields.keys()
    assert application.keys() <= ServeApplicationSchema.model_fields.keys()
    for deployment in application["deployments"]:
        assert deployment.keys() <= DeploymentSchema.model_fields.keys()
        assert deployment["autoscaling_config"].keys() <= AutoscalingConfig.model_fields.keys()
        assert deployment.get("ray_actor_options", {}).keys() <= RayActorOptionsSchema.model_fields.keys()


def test_the_deployments_of_the_serve_file_are_those_of_the_application() -> None:
    (application,) = ServeDeploySchema.model_validate(read("serve.yaml")).applications
    modules = [importlib.import_module("serve.app"), importlib.import_module("serve.deployments")]
    code = {each.name for module in modules for each in vars(module).values() if isinstance(each, Deployment)}
    named = {each.name for each in application.deployments}
    # There is one of Aliases, whatever a file says; of shards as many as the index has, which the arguments speak of.
    assert named | {"Aliases", "Shard"} == code


def test_the_service_runs_the_serve_file_and_a_pod_holds_a_replica_of_each() -> None:
    serve = read("serve.yaml")
    assert yaml.safe_load(read("rayservice.yaml")["spec"]["serveConfigV2"]) == serve
    deployments = {each["name"]: each for each in serve["applications"][0]["deployments"]}
    (workers,) = cluster_spec("rayservice.yaml")["workerGroupSpecs"]
    encoder = deployments["Encoder"]
    cpus = encoder["ray_actor_options"]["num_cpus"] + serve["applications"][0]["args"]["shard_cpus"]
    assert cpus < float(container(workers)["resources"]["limits"]["cpu"])
    assert encoder["autoscaling_config"]["max_replicas"] <= workers["maxReplicas"]
