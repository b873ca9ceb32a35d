"""Numbers of modules that ``torch.compile`` takes for constants."""

from typing import Any


class ConstantNumber:
    """An attribute that holds a number, kept as text.

    ``torch.compile(dynamic=True)`` makes a variable of each number that a module holds. Once it finds the number to be
    constant, it compiles anew. It reads text as a constant at once.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}_text"

    def __get__(self, module: Any, owner: type) -> Any:
        return self if module is None else float(getattr(module, self.name))

    def __set__(self, module: Any, value: float) -> None:
        setattr(module, self.name, repr(float(value)))


def adopt_numbers(module: Any) -> None:
    """Keep as text, too, the numbers that a module has plainly: it was pickled by an earlier version."""
    for owner in type(module).__mro__:
        for name, attribute in vars(owner).items():
            if isinstance(attribute, ConstantNumber) and name in module.__dict__:
                setattr(module, name, module.__dict__.pop(name))
