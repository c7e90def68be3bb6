"""Sphinx's roles in docstrings, as the site shows them: :class:`~a.B` is B."""

import re

import griffe


class Roles(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(
                r":\w+:`(~?)([\w.]+)`",
                lambda role: f"`{role[2].rsplit('.', 1)[-1] if role[1] else role[2]}`",
                obj.docstring.value,
            )
