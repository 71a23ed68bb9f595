//! What a case is: a name that says what is promised, and a function that checks it.

use std::fmt;
use std::future::Future;
use std::pin::Pin;

use anyhow::Result;

use super::context::T;

/// The future of one run.
pub(crate) type Run = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

/// One promise of an interface; `C` is what its check works with.
pub(crate) struct Case<C = T> {
    /// What users look under.
    pub(crate) group: &'static str,
    /// The promise in words; with the group it is the case's id.
    pub(crate) name: &'static str,
    /// Must not run beside other cases, since it changes or counts what all share.
    pub(crate) serial: bool,
    /// Checks it.
    pub(crate) run: Box<dyn Fn(C) -> Run + Send + Sync>,
}

impl<C> Case<C> {
    /// How the case is called in lists, filters and reports.
    pub(crate) fn id(&self) -> String {
        format!("{}: {}", self.group, self.name)
    }

    /// Marks it as one that runs alone.
    pub(crate) fn serial(mut self) -> Self {
        self.serial = true;
        self
    }
}

/// Makes a case of an async function.
pub(crate) fn case<C, F, Fut>(group: &'static str, name: &'static str, run: F) -> Case<C>
where
    F: Fn(C) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<()>> + Send + 'static,
{
    Case { group, name, serial: false, run: Box::new(move |t| Box::pin(run(t))) }
}

/// Ends a case that this host or endpoint cannot be asked, with the reason that was found.
#[derive(Debug)]
pub(crate) struct Skip(pub(crate) String);

impl fmt::Display for Skip {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// Returns from a case as skipped.
pub(crate) fn skip<V>(reason: impl Into<String>) -> Result<V> {
    Err(Skip(reason.into()).into())
}

/// Fails unless both are equal, telling both.
#[allow(clippy::needless_pass_by_value, reason = "most values are made for the comparison")]
pub(crate) fn same<A: fmt::Debug + PartialEq<B>, B: fmt::Debug>(
    what: &str,
    found: A,
    wanted: B,
) -> Result<()> {
    anyhow::ensure!(found == wanted, "{what} is {found:?}, expected {wanted:?}");
    Ok(())
}

/// Fails unless `text` holds `part`.
pub(crate) fn holds(what: &str, text: &str, part: &str) -> Result<()> {
    anyhow::ensure!(text.contains(part), "{what} does not hold {part:?}: {text:?}");
    Ok(())
}

/// The error of a call that must not succeed.
pub(crate) fn refused<V: fmt::Debug>(what: &str, result: Result<V, tonic::Status>) -> Result<tonic::Status> {
    match result {
        Err(status) => Ok(status),
        Ok(answer) => anyhow::bail!("{what} was accepted: {answer:?}"),
    }
}

/// Fails unless the call was refused with one of these codes.
pub(crate) fn refused_with<V: fmt::Debug>(
    what: &str,
    result: Result<V, tonic::Status>,
    codes: &[tonic::Code],
) -> Result<tonic::Status> {
    let status = refused(what, result)?;
    anyhow::ensure!(
        codes.contains(&status.code()),
        "{what}: code {:?}, expected {codes:?}: {}",
        status.code(),
        status.message()
    );
    Ok(status)
}
