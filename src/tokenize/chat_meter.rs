//! What a chat template may cost.
//!
//! Templates come with models, and models come from anywhere. Fuel bounds how many instructions a
//! template runs, but one instruction may double a text, and forty of them would fill any memory.
//! So the syntax tree is rewritten before it is compiled: every value that an expression yields
//! passes a filter that weighs it, and operations whose result can be far larger than their
//! operands become functions that look before they allocate.

use minijinja::machinery::Span;
use minijinja::machinery::ast::{self, CallArg, Expr, Spanned, Stmt};
use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Filter that weighs a value and passes it on.
pub(super) const WEIGH: &str = "__weigh";
/// Filter in place of the `~` operator.
pub(super) const CONCAT: &str = "__concat";
/// Filter in place of the `*` operator.
pub(super) const TIMES: &str = "__times";

/// Filter around what a loop walks.
pub(super) const ITERATE: &str = "__iterate";

/// Bytes of the largest text, and weight of the largest value.
const MAX_VALUE: usize = 1 << 20;
/// Weight of all values that a rendering yields, one after another.
const MAX_WORK: usize = 1 << 26;
/// Bytes that a rendering may write.
const MAX_OUTPUT: usize = 1 << 22;
/// Lists in lists.
pub(super) const MAX_NESTING: usize = 16;
/// Depth of the syntax tree.
const MAX_DEPTH: usize = 256;
/// Weight of a value without its text: about what it takes in memory.
const CELL: usize = 32;

/// Counts what a rendering has cost.
#[derive(Debug, Default)]
pub(super) struct Meter {
    work: AtomicUsize,
    written: AtomicUsize,
    exceeded: AtomicBool,
}

impl Meter {
    /// Whether a limit was the reason for an error.
    pub(super) fn exceeded(&self) -> bool {
        self.exceeded.load(Ordering::Relaxed)
    }

    /// Weighs a value.
    pub(super) fn weigh(&self, value: &Value) -> Result<(), Error> {
        let mut left = MAX_VALUE;
        let small = weigh(value, MAX_NESTING, &mut left);
        self.add(&self.work, MAX_VALUE - left, MAX_WORK, "computes too much")?;
        small.ok_or_else(|| self.over("makes a value that is too large or too deep"))
    }

    /// Counts written bytes.
    pub(super) fn write(&self, bytes: usize) -> Result<(), Error> {
        self.add(&self.written, bytes, MAX_OUTPUT, "writes too much")
    }

    /// Refuses results larger than the largest value.
    pub(super) fn check_size(&self, bytes: Option<usize>) -> Result<(), Error> {
        match bytes {
            Some(bytes) if bytes <= MAX_VALUE => Ok(()),
            _ => Err(self.over("makes a text that is too long")),
        }
    }

    /// The text of values, one after another, with `between` between them.
    pub(super) fn text<'v>(
        &self,
        values: impl Iterator<Item = &'v Value>,
        between: &str,
    ) -> Result<String, Error> {
        let mut text = Bounded(String::new());
        let write = || {
            for (index, value) in values.enumerate() {
                fmt::Write::write_str(&mut text, if index == 0 { "" } else { between })?;
                fmt::Write::write_fmt(&mut text, format_args!("{value}"))?;
            }
            fmt::Result::Ok(())
        };
        write().map_err(|_| self.over("makes a text that is too long"))?;
        Ok(text.0)
    }

    fn add(&self, counter: &AtomicUsize, amount: usize, limit: usize, what: &str) -> Result<(), Error> {
        let before = counter.fetch_add(amount, Ordering::Relaxed);
        if before.saturating_add(amount) > limit { Err(self.over(what)) } else { Ok(()) }
    }

    fn over(&self, what: &str) -> Error {
        self.exceeded.store(true, Ordering::Relaxed);
        Error::new(ErrorKind::InvalidOperation, what.to_owned())
    }
}

/// A text that ends at the size of the largest value.
pub(super) struct Bounded(pub(super) String);

impl fmt::Write for Bounded {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        if self.0.len() + part.len() > MAX_VALUE {
            return Err(fmt::Error);
        }
        self.0.push_str(part);
        Ok(())
    }
}

/// Takes a value's weight from what is left; `None` when it does not suffice.
///
/// Shared parts count as often as they occur, because that is how often they are walked.
fn weigh(value: &Value, nesting: usize, left: &mut usize) -> Option<()> {
    *left = left.checked_sub(CELL + value.as_str().map_or(0, str::len))?;
    let kind = value.kind();
    if !matches!(kind, ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
        return Some(());
    }
    let nesting = nesting.checked_sub(1)?;
    // What cannot be iterated says so where the template tries.
    let Ok(items) = value.try_iter() else { return Some(()) };
    for item in items {
        weigh(&item, nesting, left)?;
        if kind == ValueKind::Map
            && let Ok(value) = value.get_item(&item)
        {
            weigh(&value, nesting, left)?;
        }
    }
    Some(())
}

/// The same template with every value weighed.
pub(super) fn metered<'a>(template: &Stmt<'a>) -> Result<Stmt<'a>, Error> {
    Rewriter { depth: 0 }.statement(template)
}

struct Rewriter {
    depth: usize,
}

impl Rewriter {
    /// Syntax trees are walked by recursion, here and in the compiler.
    fn deeper<T>(&mut self, walk: impl FnOnce(&mut Self) -> Result<T, Error>) -> Result<T, Error> {
        if self.depth == MAX_DEPTH {
            return Err(Error::new(ErrorKind::SyntaxError, "is nested too deeply"));
        }
        self.depth += 1;
        let result = walk(self);
        self.depth -= 1;
        result
    }

    fn statement<'a>(&mut self, statement: &Stmt<'a>) -> Result<Stmt<'a>, Error> {
        self.deeper(|this| match statement {
            Stmt::EmitRaw(raw) => Ok(emit(constant(Value::from(raw.raw), raw.span()), raw.span())),
            Stmt::EmitExpr(emitted) => Ok(emit(this.plain(&emitted.expr)?, emitted.span())),
            Stmt::Continue(node) => Ok(Stmt::Continue(Spanned::new(ast::Continue, node.span()))),
            Stmt::Break(node) => Ok(Stmt::Break(Spanned::new(ast::Break, node.span()))),
            Stmt::Set(_) | Stmt::Do(_) | Stmt::WithBlock(_) | Stmt::SetBlock(_) => this.binding(statement),
            _ => this.block(statement),
        })
    }

    fn body<'a>(&mut self, body: &[Stmt<'a>]) -> Result<Vec<Stmt<'a>>, Error> {
        body.iter().map(|statement| self.statement(statement)).collect()
    }

    fn binding<'a>(&mut self, statement: &Stmt<'a>) -> Result<Stmt<'a>, Error> {
        Ok(match statement {
            Stmt::Set(set) => {
                let node = ast::Set { target: self.target(&set.target)?, expr: self.weighed(&set.expr)? };
                Stmt::Set(Spanned::new(node, set.span()))
            }
            Stmt::SetBlock(set) => {
                let target = self.target(&set.target)?;
                let filter = self.optional(set.filter.as_ref(), Self::plain)?;
                let node = ast::SetBlock { target, filter, body: self.body(&set.body)? };
                Stmt::SetBlock(Spanned::new(node, set.span()))
            }
            Stmt::WithBlock(with) => {
                let one =
                    |(target, value): &(Expr<'a>, Expr<'a>)| Ok((self.target(target)?, self.weighed(value)?));
                let assignments = with.assignments.iter().map(one).collect::<Result<_, Error>>()?;
                let node = ast::WithBlock { assignments, body: self.body(&with.body)? };
                Stmt::WithBlock(Spanned::new(node, with.span()))
            }
            Stmt::Do(node) => Stmt::Do(Spanned::new(ast::Do { call: self.call(&node.call)? }, node.span())),
            _ => return Err(unsupported("statement")),
        })
    }

    fn block<'a>(&mut self, statement: &Stmt<'a>) -> Result<Stmt<'a>, Error> {
        Ok(match statement {
            Stmt::Template(node) => {
                let template = ast::Template { children: self.body(&node.children)? };
                Stmt::Template(Spanned::new(template, node.span()))
            }
            Stmt::IfCond(node) => {
                let expr = self.weighed(&node.expr)?;
                let (true_body, false_body) = (self.body(&node.true_body)?, self.body(&node.false_body)?);
                Stmt::IfCond(Spanned::new(ast::IfCond { expr, true_body, false_body }, node.span()))
            }
            Stmt::ForLoop(node) => Stmt::ForLoop(Spanned::new(self.for_loop(node)?, node.span())),
            Stmt::FilterBlock(node) => {
                let block =
                    ast::FilterBlock { filter: self.plain(&node.filter)?, body: self.body(&node.body)? };
                Stmt::FilterBlock(Spanned::new(block, node.span()))
            }
            Stmt::Macro(node) => Stmt::Macro(self.declaration(node)?),
            Stmt::CallBlock(node) => {
                let (call, macro_decl) = (self.call(&node.call)?, self.declaration(&node.macro_decl)?);
                Stmt::CallBlock(Spanned::new(ast::CallBlock { call, macro_decl }, node.span()))
            }
            _ => return Err(unsupported("tag")),
        })
    }

    fn for_loop<'a>(&mut self, node: &ast::ForLoop<'a>) -> Result<ast::ForLoop<'a>, Error> {
        Ok(ast::ForLoop {
            target: self.target(&node.target)?,
            iter: filter(ITERATE, self.weighed(&node.iter)?, vec![], node.iter.span()),
            filter_expr: self.optional(node.filter_expr.as_ref(), Self::weighed)?,
            recursive: node.recursive,
            body: self.body(&node.body)?,
            else_body: self.body(&node.else_body)?,
        })
    }

    fn declaration<'a>(&mut self, node: &Spanned<ast::Macro<'a>>) -> Result<Spanned<ast::Macro<'a>>, Error> {
        let args = node.args.iter().map(|arg| self.target(arg)).collect::<Result<_, _>>()?;
        let defaults = self.all(&node.defaults)?;
        let body = self.body(&node.body)?;
        Ok(Spanned::new(ast::Macro { name: node.name, args, defaults, body }, node.span()))
    }

    /// What is assigned to: a name, an attribute of a namespace, or several of them.
    fn target<'a>(&mut self, target: &Expr<'a>) -> Result<Expr<'a>, Error> {
        self.deeper(|this| {
            let all = |this: &mut Self, items: &[Expr<'a>]| {
                items.iter().map(|item| this.target(item)).collect::<Result<Vec<_>, Error>>()
            };
            Ok(match target {
                Expr::Var(node) => variable(node),
                Expr::GetAttr(node) => {
                    let attribute = ast::GetAttr { expr: this.target(&node.expr)?, name: node.name };
                    Expr::GetAttr(Spanned::new(attribute, node.span()))
                }
                Expr::List(node) => {
                    Expr::List(Spanned::new(ast::List { items: all(this, &node.items)? }, node.span()))
                }
                Expr::Tuple(node) => {
                    Expr::Tuple(Spanned::new(ast::Tuple { items: all(this, &node.items)? }, node.span()))
                }
                _ => return Err(unsupported("target of an assignment")),
            })
        })
    }

    /// An expression whose value is weighed.
    fn weighed<'a>(&mut self, expr: &Expr<'a>) -> Result<Expr<'a>, Error> {
        let plain = self.plain(expr)?;
        Ok(match plain {
            // Constants stand in the source, and truth values weigh nothing.
            Expr::Const(_) | Expr::Compare(_) | Expr::Test(_) | Expr::UnaryOp(_) => plain,
            _ => filter(WEIGH, plain, vec![], expr.span()),
        })
    }

    fn all<'a>(&mut self, items: &[Expr<'a>]) -> Result<Vec<Expr<'a>>, Error> {
        items.iter().map(|item| self.weighed(item)).collect()
    }

    fn optional<'a>(
        &mut self,
        expr: Option<&Expr<'a>>,
        walk: fn(&mut Self, &Expr<'a>) -> Result<Expr<'a>, Error>,
    ) -> Result<Option<Expr<'a>>, Error> {
        expr.map(|expr| walk(self, expr)).transpose()
    }

    /// An expression whose parts are weighed.
    fn plain<'a>(&mut self, expr: &Expr<'a>) -> Result<Expr<'a>, Error> {
        self.deeper(|this| match expr {
            Expr::Var(node) => Ok(variable(node)),
            Expr::Const(node) => Ok(constant(node.value.clone(), node.span())),
            Expr::BinOp(node) => this.binary(node),
            Expr::Call(node) => Ok(Expr::Call(this.call(node)?)),
            Expr::List(_) | Expr::Tuple(_) | Expr::Map(_) => this.container(expr),
            Expr::GetAttr(_) | Expr::GetItem(_) | Expr::Slice(_) => this.access(expr),
            _ => this.operation(expr),
        })
    }

    fn container<'a>(&mut self, expr: &Expr<'a>) -> Result<Expr<'a>, Error> {
        Ok(match expr {
            Expr::List(node) => {
                Expr::List(Spanned::new(ast::List { items: self.all(&node.items)? }, node.span()))
            }
            Expr::Tuple(node) => {
                Expr::Tuple(Spanned::new(ast::Tuple { items: self.all(&node.items)? }, node.span()))
            }
            Expr::Map(node) => {
                let map = ast::Map { keys: self.all(&node.keys)?, values: self.all(&node.values)? };
                Expr::Map(Spanned::new(map, node.span()))
            }
            _ => return Err(unsupported("expression")),
        })
    }

    fn access<'a>(&mut self, expr: &Expr<'a>) -> Result<Expr<'a>, Error> {
        Ok(match expr {
            Expr::GetAttr(node) => {
                let attribute = ast::GetAttr { expr: self.weighed(&node.expr)?, name: node.name };
                Expr::GetAttr(Spanned::new(attribute, node.span()))
            }
            Expr::GetItem(node) => {
                let (expr, subscript_expr) = (self.weighed(&node.expr)?, self.weighed(&node.subscript_expr)?);
                Expr::GetItem(Spanned::new(ast::GetItem { expr, subscript_expr }, node.span()))
            }
            Expr::Slice(node) => {
                let slice = ast::Slice {
                    expr: self.weighed(&node.expr)?,
                    start: self.optional(node.start.as_ref(), Self::weighed)?,
                    stop: self.optional(node.stop.as_ref(), Self::weighed)?,
                    step: self.optional(node.step.as_ref(), Self::weighed)?,
                };
                Expr::Slice(Spanned::new(slice, node.span()))
            }
            _ => return Err(unsupported("expression")),
        })
    }

    fn operation<'a>(&mut self, expr: &Expr<'a>) -> Result<Expr<'a>, Error> {
        Ok(match expr {
            Expr::UnaryOp(node) => {
                let negates = matches!(node.op, ast::UnaryOpKind::Neg);
                let op = if negates { ast::UnaryOpKind::Neg } else { ast::UnaryOpKind::Not };
                let operation = ast::UnaryOp { op, expr: self.weighed(&node.expr)? };
                Expr::UnaryOp(Spanned::new(operation, node.span()))
            }
            Expr::Compare(node) => {
                let one = |part: &ast::CompareOp<'a>| {
                    Ok(ast::CompareOp { op: part.op, expr: self.weighed(&part.expr)? })
                };
                let ops = node.ops.iter().map(one).collect::<Result<_, Error>>()?;
                let compare = ast::Compare { expr: self.weighed(&node.expr)?, ops };
                Expr::Compare(Spanned::new(compare, node.span()))
            }
            Expr::IfExpr(node) => {
                let choice = ast::IfExpr {
                    test_expr: self.weighed(&node.test_expr)?,
                    true_expr: self.weighed(&node.true_expr)?,
                    false_expr: self.optional(node.false_expr.as_ref(), Self::weighed)?,
                };
                Expr::IfExpr(Spanned::new(choice, node.span()))
            }
            Expr::Filter(node) => {
                let expr = self.optional(node.expr.as_ref(), Self::weighed)?;
                let filter = ast::Filter { name: node.name, expr, args: self.arguments(&node.args)? };
                Expr::Filter(Spanned::new(filter, node.span()))
            }
            Expr::Test(node) => {
                let (expr, args) = (self.weighed(&node.expr)?, self.arguments(&node.args)?);
                Expr::Test(Spanned::new(ast::Test { name: node.name, expr, args }, node.span()))
            }
            _ => return Err(unsupported("expression")),
        })
    }

    fn binary<'a>(&mut self, node: &Spanned<ast::BinOp<'a>>) -> Result<Expr<'a>, Error> {
        let (left, right, span) = (self.weighed(&node.left)?, self.weighed(&node.right)?, node.span());
        Ok(match node.op {
            ast::BinOpKind::Concat => filter(CONCAT, left, vec![CallArg::Pos(right)], span),
            ast::BinOpKind::Mul => filter(TIMES, left, vec![CallArg::Pos(right)], span),
            op => Expr::BinOp(Spanned::new(ast::BinOp { op, left, right }, span)),
        })
    }

    fn call<'a>(&mut self, node: &Spanned<ast::Call<'a>>) -> Result<Spanned<ast::Call<'a>>, Error> {
        let expr = match &node.expr {
            // Functions and methods are called by name.
            Expr::Var(name) => variable(name),
            method @ Expr::GetAttr(_) => self.access(method)?,
            other => self.weighed(other)?,
        };
        Ok(Spanned::new(ast::Call { expr, args: self.arguments(&node.args)? }, node.span()))
    }

    fn arguments<'a>(&mut self, arguments: &[CallArg<'a>]) -> Result<Vec<CallArg<'a>>, Error> {
        let one = |argument: &CallArg<'a>| {
            Ok(match argument {
                CallArg::Pos(expr) => CallArg::Pos(self.weighed(expr)?),
                CallArg::Kwarg(name, expr) => CallArg::Kwarg(name, self.weighed(expr)?),
                CallArg::PosSplat(expr) => CallArg::PosSplat(self.weighed(expr)?),
                CallArg::KwargSplat(expr) => CallArg::KwargSplat(self.weighed(expr)?),
            })
        };
        arguments.iter().map(one).collect()
    }
}

fn variable<'a>(node: &Spanned<ast::Var<'a>>) -> Expr<'a> {
    Expr::Var(Spanned::new(ast::Var { id: node.id }, node.span()))
}

fn constant<'a>(value: Value, span: Span) -> Expr<'a> {
    Expr::Const(Spanned::new(ast::Const { value }, span))
}

fn emit(expr: Expr<'_>, span: Span) -> Stmt<'_> {
    Stmt::EmitExpr(Spanned::new(ast::EmitExpr { expr }, span))
}

fn filter<'a>(name: &'static str, expr: Expr<'a>, args: Vec<CallArg<'a>>, span: Span) -> Expr<'a> {
    Expr::Filter(Spanned::new(ast::Filter { name, expr: Some(expr), args }, span))
}

fn unsupported(what: &str) -> Error {
    Error::new(ErrorKind::SyntaxError, format!("uses a {what} that chat templates do not have"))
}
