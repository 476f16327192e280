//! Records that only another of ours is to read, in a stream that a stock daemon may read, too: it skips types that it does
//! not know.

use tracing::warn;
use xenstore_wire::stream::{Format, Record, read_all, write_all};

/// Type of a record that holds a whole stream of its own, "FERT".
pub(crate) const WRAPPED: u32 = 0x4645_5254;

/// Records as one that is skipped; none if they fit in no stream.
pub(crate) fn wrap<'a>(records: impl IntoIterator<Item = &'a Record>) -> Option<Record> {
    let body = write_all(Format::V2, records).inspect_err(|e| warn!("the next daemon will not know: {e}")).ok()?;
    Some(Record::Unknown { kind: WRAPPED, body })
}

/// What was wrapped. One level only.
pub(crate) fn unwrap(body: &[u8]) -> Vec<Record> {
    match read_all(body) {
        Ok((_, mut inner)) => {
            inner.retain(|r| !matches!(r, Record::Unknown { .. }));
            inner
        }
        Err(e) => {
            warn!("what the daemon before knew beyond a stock one is lost in part: {e}");
            Vec::new()
        }
    }
}
