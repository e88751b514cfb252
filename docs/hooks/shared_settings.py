"""Shows factories with the settings that all samplers share, as `help` and editors show them.

The documentation is made from source text, where a factory takes `**shared`. Its decorator puts the
settings into the signature and the docstring when it is imported: they are taken from there.
"""

import importlib
import inspect
from typing import Any

import griffe


class SharedSettingsExtension(griffe.Extension):
    """Takes signature and docstring of factories from the imported function."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Called for every function once its source is read."""
        if not any("takes_shared_settings" in str(each.value) for each in func.decorators):
            return
        factory = getattr(importlib.import_module(func.module.path), func.name)
        written = {parameter.name: parameter for parameter in func.parameters}
        func.parameters = griffe.Parameters(
            *(
                written.get(parameter.name, _shown(parameter, func))
                for parameter in inspect.signature(factory).parameters.values()
            )
        )
        # What comes of `__doc__` is what the docstring's parser would get.
        parser, options = func.docstring.parser, func.docstring.parser_options
        func.docstring = griffe.Docstring(
            inspect.getdoc(factory) or "", parent=func, parser=parser, parser_options=options
        )


def _shown(parameter: inspect.Parameter, func: griffe.Function) -> griffe.Parameter:
    annotation = inspect.formatannotation(parameter.annotation)
    for prefix in ("torch.", "funcsgmcmc.schedules.", "tensordict.base.", "collections.abc."):
        annotation = annotation.replace(prefix, "")
    required = parameter.default is parameter.empty
    return griffe.Parameter(
        parameter.name,
        kind=griffe.ParameterKind.keyword_only,
        annotation=annotation,
        default=None if required else repr(parameter.default),
    )
