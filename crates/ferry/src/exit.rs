//! Exit codes, the same for every subcommand.

use std::fmt;
use std::process::ExitCode;

/// What a failure means to a script. The numbers are part of the interface and listed in `ferry --help`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Failed; the message says where a guest that was to be moved is now.
    Failed = 1,
    /// Refused before anything was touched.
    Refused = 3,
    /// A limit could not be kept, or it was cancelled; the guest is where it was.
    GivenUp = 4,
    /// The outcome of a migration is not known yet.
    Unresolved = 5,
}

impl Exit {
    /// From the number; an unknown one is [`Exit::Failed`].
    pub fn from_number(number: u8) -> Exit {
        [Exit::Refused, Exit::GivenUp, Exit::Unresolved]
            .into_iter()
            .find(|e| *e as u8 == number)
            .unwrap_or(Exit::Failed)
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

/// An error that carries its exit code; any other error is [`Exit::Failed`].
#[derive(Debug)]
pub struct Failure {
    pub exit: Exit,
    pub message: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// The code that the outermost [`Failure`] in the error's chain asks for.
pub fn code_of(error: &anyhow::Error) -> Exit {
    error.chain().find_map(|e| e.downcast_ref::<Failure>()).map_or(Exit::Failed, |f| f.exit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn context_does_not_hide_the_code() {
        let error = Err::<(), _>(Failure { exit: Exit::Refused, message: "domid 5 is taken".into() })
            .context("domain web1: preflight")
            .unwrap_err();
        assert_eq!(code_of(&error), Exit::Refused);
        assert_eq!(code_of(&anyhow::anyhow!("plain")), Exit::Failed);
    }
}
