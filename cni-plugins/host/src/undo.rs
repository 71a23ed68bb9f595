//! Steps to take back when a later one fails, newest first.
//!
//! Input: described closures, pushed before or after the step that changes the system. They do not run
//! until [`UndoList::run`]; dropping the list (success) drops them unrun.

use std::fmt::Display;

type Step<'a> = Box<dyn FnOnce() -> Result<(), String> + 'a>;

/// Undo steps of an operation in progress.
#[derive(Default)]
pub struct UndoList<'a> {
    steps: Vec<(String, Step<'a>)>,
}

impl<'a> UndoList<'a> {
    /// An empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Remembers how to take a step back.
    pub fn push<E: Display>(&mut self, what: impl Into<String>, step: impl FnOnce() -> Result<(), E> + 'a) {
        let step = move || step().map_err(|error| error.to_string());
        self.steps.push((what.into(), Box::new(step)));
    }

    /// Takes every step back, newest first, going on after failures; returns those as
    /// `what: error`.
    pub fn run(mut self) -> Vec<String> {
        let mut failures = Vec::new();
        while let Some((what, step)) = self.steps.pop() {
            if let Err(error) = step() {
                failures.push(format!("{what}: {error}"));
            }
        }
        failures
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn runs_backwards_and_past_failures() {
        let order = RefCell::new(Vec::new());
        let mut undo = UndoList::new();
        for step in ["bridge", "veth", "address"] {
            let order = &order;
            undo.push(step, move || {
                order.borrow_mut().push(step);
                if step == "veth" { Err("busy") } else { Ok(()) }
            });
        }
        assert_eq!(undo.run(), ["veth: busy"]);
        assert_eq!(*order.borrow(), ["address", "veth", "bridge"]);
    }

    #[test]
    fn a_dropped_list_undoes_nothing() {
        let ran = RefCell::new(false);
        let mut undo = UndoList::new();
        undo.push("step", || {
            *ran.borrow_mut() = true;
            Ok::<(), String>(())
        });
        drop(undo);
        assert!(!*ran.borrow());
    }
}
