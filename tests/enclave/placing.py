"""An arrangement in this process: the enclave's inside without its socket."""

from __future__ import annotations

from typing import Any, cast

from lasagna.enclave import messages as m
from lasagna.enclave.arrangement import Arrangement, Sessions, arrange
from lasagna.enclave.model import LoadedModel
from lasagna.enclave.sessions import native_block
from lasagna.enclave.spans import Recorder
from lasagna.package.forms import Form, choose_variant
from lasagna.package.reader import OpenPackage, Package
from lasagna.policy.memory import divide
from lasagna.policy.plan import MemoryPlan, Style
from lasagna.server.costs import arrange_message, forms_of, machine_of
from lasagna.trust.keys import SecretKey, ServiceSecret, service_keys

from .conftest import Sealed

SERVICE = service_keys(ServiceSecret(SecretKey(bytes(range(32)))))
ONLY = {form: index for index, form in enumerate((Form.SLICED, Form.WHOLE, Form.FROZEN))}


def loaded_model(sealed: Sealed) -> LoadedModel:
    """The model as after Load; whoever gave its keys is not asked."""
    opened = OpenPackage(Package(sealed.path), sealed.keys.content_key.reveal())
    variant = choose_variant(opened.manifest.variants, native_block())
    return LoadedModel(
        opened.package.model_digest,
        "squeezenet",
        opened,
        variant,
        opened.details(variant),
        cast(Any, None),
        SERVICE,
    )


def planned(
    loaded: LoadedModel,
    budget: int,
    *,
    rows: int = 1,
    threads: int = 1,
    style: Style | None = None,
    form: Form | None = None,
) -> tuple[MemoryPlan, m.Arrange]:
    """What a host plans for it: in the best form, or in this one."""
    vanilla = form is Form.VANILLA
    forms = forms_of(loaded.variant, rows, paged=vanilla)
    if form in ONLY:
        forms = (forms[ONLY[form]],)
    machine = machine_of(budget, threads, paged=vanilla)
    plan = divide({"squeezenet": forms}, {}, machine, style or Style(max_rows=rows))
    return plan, arrange_message(1, plan, {"squeezenet": loaded.digest})


def placed(loaded: LoadedModel, command: m.Arrange, budget: int) -> Arrangement:
    """What the enclave makes of it."""
    return arrange(
        command,
        {loaded.digest: loaded},
        Sessions(),
        Recorder(),
        budget=budget,
        threads=command.lanes,
    )
