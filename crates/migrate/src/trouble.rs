//! What went wrong, said so that an operator can act on it.

use std::error::Error;
use std::fmt;

/// A failure inside one step: the cause, and what to do about it where that is known. Whoever reports it adds domain and step.
#[derive(Debug)]
pub struct Trouble {
    what: String,
    todo: Option<String>,
    source: Option<Box<dyn Error + Send + Sync>>,
}

pub type Result<T> = std::result::Result<T, Trouble>;

impl Trouble {
    pub fn new(what: impl Into<String>) -> Self {
        Trouble { what: what.into(), todo: None, source: None }
    }

    /// Adds what the operator should do.
    #[must_use]
    pub fn todo(mut self, todo: impl Into<String>) -> Self {
        self.todo = Some(todo.into());
        self
    }

    /// Says what was being done when `source` happened.
    pub fn because(what: impl Into<String>, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Trouble { what: what.into(), todo: None, source: Some(source.into()) }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        let mut said = self.what.clone();
        let mut source = self.source.as_ref().map(|s| &**s as &dyn Error);
        while let Some(error) = source {
            let text = error.to_string();
            // Some errors tell their source's text themselves.
            if !said.ends_with(&text) {
                let colon = if said.is_empty() { "" } else { ": " };
                write!(f, "{colon}{text}")?;
                said = text;
            }
            source = error.source();
        }
        match &self.todo {
            Some(todo) => write!(f, "; {todo}"),
            None => Ok(()),
        }
    }
}

impl Error for Trouble {}

macro_rules! from {
    ($($error:ty),*) => {
        $(impl From<$error> for Trouble {
            fn from(error: $error) -> Self {
                Trouble::because("", error)
            }
        })*
    };
}

from!(
    hypervisor::HypervisorError,
    crate::journal::JournalError,
    crate::wire::WireError,
    std::io::Error,
    serde_json::Error,
    xen_abi::hvm_save::StreamError,
    migration_stream::StreamError,
    migration_stream::ErrorKind
);

/// Adds what was being done to an error.
pub trait Doing<T> {
    fn doing(self, what: impl Into<String>) -> Result<T>;
}

impl<T, E: Into<Box<dyn Error + Send + Sync>>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl Into<String>) -> Result<T> {
        self.map_err(|error| Trouble::because(what, error))
    }
}
