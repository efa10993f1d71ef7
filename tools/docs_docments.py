"""An extension of griffe, which reads the package for the reference: the comment behind a parameter or field is its description."""

import ast
import io
import re
import textwrap
import tokenize

import griffe

SHAPE = re.compile(r"(Float|Int|Bool|Shaped|Num)\[")  # of jaxtyping


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
        source = textwrap.dedent("\n".join(func.lines))
        try:
            node = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
        except (SyntaxError, StopIteration):
            return
        named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        arguments = [argument for argument in named if argument is not None and argument.arg not in ("self", "cls")]
        for argument in arguments:  # shapes are texts, which griffe takes for names that it cannot find
            if isinstance(argument.annotation, ast.expr) and SHAPE.search(text := ast.unparse(argument.annotation)):
                func.parameters[argument.arg].annotation = text.replace("'", '"')
        if node.returns is not None and SHAPE.search(text := ast.unparse(node.returns)):
            func.returns = text.replace("'", '"')
        said, first = comments(source), node.body[0].lineno
        last_on_line = {argument.end_lineno: argument.arg for argument in arguments}
        described = {name: said[line] for line, name in sorted(last_on_line.items()) if line in said and line < first}
        if described:
            text = func.docstring.value if func.docstring else ""
            section = "\n".join(f"    {name}: {what}" for name, what in described.items())
            func.docstring = griffe.Docstring(f"{text}\n\nParameters:\n{section}", parent=func, lineno=func.lineno, parser="google")

    def on_attribute(self, *, attr: griffe.Attribute, **_) -> None:
        if attr.docstring is None and (said := comments("\n".join(attr.lines))):
            attr.docstring = griffe.Docstring(list(said.values())[-1], parent=attr, parser="google")
