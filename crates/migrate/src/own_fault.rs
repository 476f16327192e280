//! A panic in a migration's thread: a fault of this program's, which must not cost the guest more than a restart of the daemon would.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `work`; if it panics, what it said.
pub fn caught(work: impl FnOnce()) -> Result<(), String> {
    // Whoever calls this throws away what `work` had in hand, and begins again from the journal.
    catch_unwind(AssertUnwindSafe(work)).map_err(|payload| text(&*payload))
}

fn text(payload: &(dyn Any + Send)) -> String {
    let said = payload.downcast_ref::<&str>().copied().or(payload.downcast_ref::<String>().map(String::as_str));
    said.unwrap_or("a panic without a text").to_owned()
}

/// For the log and the report.
pub fn explained(what: &str) -> String {
    format!("ferryd itself is at fault (panic: {what}); please report it with its log")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_panic_says_is_kept() {
        assert_eq!(caught(|| ()), Ok(()));
        assert_eq!(caught(|| panic!("plain")), Err("plain".into()));
        assert_eq!(caught(|| panic!("number {}", 7)), Err("number 7".into()));
        assert_eq!(caught(|| std::panic::panic_any(7)), Err("a panic without a text".into()));
    }
}
