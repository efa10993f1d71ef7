"""A plugin for mypy: attributes that torch.nn.Module finds at run time are of any type, not `Tensor | Module`.

torch declares `Module.__getattr__` to return `Tensor | Module`, which is right for buffers and layers, and makes every call of a
method of a network that was passed as `nn.Module` an error. Everything else about torch is checked.
"""

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, ProperType, Type, TypeOfAny, UnionType, get_proper_type

FOUND_AT_RUN_TIME = {"torch._tensor.Tensor", "torch.nn.modules.module.Module"}


def any_attribute(context: AttributeContext) -> Type:
    """Any, where torch says `Tensor | Module`."""
    kind: ProperType = get_proper_type(context.default_attr_type)
    if isinstance(kind, UnionType) and {str(item) for item in kind.items} == FOUND_AT_RUN_TIME:
        return AnyType(TypeOfAny.special_form)
    return context.default_attr_type


class TorchPlugin(Plugin):
    def get_attribute_hook(self, fullname: str):
        return any_attribute


def plugin(version: str) -> type[Plugin]:
    return TorchPlugin
