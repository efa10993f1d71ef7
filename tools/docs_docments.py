"""An extension of griffe, which reads the package for the reference: the comment behind a parameter or field is its description."""

import ast
import io
import tokenize

import griffe


def comments(source: str) -> dict[int, str]:
    """Line (from 1) -> comment, as far as the text can be read as Python."""
    found = {}
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                found[token.start[0]] = token.string.lstrip("# ").strip()
    except (tokenize.TokenError, IndentationError):
        pass
    return found


class Docments(griffe.Extension):
    def on_function(self, *, func: griffe.Function, **_) -> None:
        source = "\n".join(func.lines)
        said = comments(source)
        try:
            node = next(n for n in ast.walk(ast.parse(_dedented(source))) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
        except (SyntaxError, StopIteration):
            return
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        last_on_line = {argument.end_lineno: argument.arg for argument in arguments if argument is not None}
        first = node.body[0].lineno
        described = {name: said[line] for line, name in sorted(last_on_line.items()) if line in said and line < first}
        if not described:
            return
        text = func.docstring.value if func.docstring else ""
        section = "\n".join(f"    {name}: {what}" for name, what in described.items())
        func.docstring = griffe.Docstring(f"{text}\n\nParameters:\n{section}", parent=func, lineno=func.lineno)

    def on_attribute(self, *, attr: griffe.Attribute, **_) -> None:
        if attr.docstring is None and (said := comments("\n".join(attr.lines))):
            attr.docstring = griffe.Docstring(list(said.values())[-1], parent=attr)


def _dedented(source: str) -> str:
    first = source.splitlines()[0] if source else ""
    return "if True:\n" + source if first[:1].isspace() else source
