//! The bench's figures, from the lab's report of a run, and the table that shows them. No I/O.

use super::SIZES;
use anyhow::{Context, Result};
use migrate::report::{Place, Report};
use serde_json::{Value, json};
use std::fmt::Write as _;

/// One move that was made.
#[derive(Debug, Clone, PartialEq)]
struct Moved {
    guest: String,
    stock: bool,
    way: String,
    /// Steps of the blackout, as the tool reports them, in their order: where, what, ms. Empty for stock xl, which reports none.
    steps: Vec<(Place, String, f64)>,
    /// How long the guest's vifs were silent before and after those, by the tool's report, ms.
    around: Option<[f64; 2]>,
    /// The longest gap that the guest saw in a clock, ms.
    gap: Option<f64>,
    /// The longest time that the peer heard nothing, ms.
    silence: Option<f64>,
    /// From the command to its end, s.
    total: Option<f64>,
    /// What the hosts sent each other meanwhile, MiB.
    sent: Option<f64>,
}

impl Moved {
    fn read(entry: &Value) -> Result<Moved> {
        let text = |key: &str| entry[key].as_str().with_context(|| format!("moves[].{key} is no text"));
        let ms = |key: &str| entry[key].as_f64().map(|seconds| seconds * 1e3);
        let report: Option<Report> =
            serde_json::from_value(entry["report"].clone()).context("moves[].report is no report of ferry")?;
        let around =
            report.as_ref().and_then(|r| r.silence).map(|s| [s.before_us, s.after_us].map(|us| us as f64 / 1e3));
        let steps = report.map(|r| r.steps).unwrap_or_default();
        Ok(Moved {
            guest: text("guest")?.to_owned(),
            stock: text("how")?.starts_with("xl"),
            way: format!("{} to {}", text("from")?, text("to")?),
            steps: steps.into_iter().map(|s| (s.place, s.name, s.micros as f64 / 1e3)).collect(),
            around,
            gap: ms("clock_gap"),
            silence: ms("udp_silence"),
            total: entry["total"].as_f64(),
            sent: entry["bytes"].as_f64().map(|bytes| bytes / f64::from(1 << 20)),
        })
    }

    /// The steps added up, ms.
    fn blackout(&self) -> Option<f64> {
        (!self.steps.is_empty()).then(|| self.steps.iter().map(|(_, _, ms)| ms).sum())
    }

    /// What the report adds up to, as a part of what the peer saw: the steps of the blackout, and the silences before and after them.
    fn accounted(&self) -> Option<f64> {
        ratio(
            self.blackout().zip(self.around).map(|(blackout, [before, after])| before + blackout + after),
            self.silence,
        )
    }

    /// Only what of it is the blackout.
    fn blackout_of_silence(&self) -> Option<f64> {
        ratio(self.blackout(), self.silence)
    }

    fn step(&self, place: Place, name: &str) -> f64 {
        self.steps.iter().filter(|(p, n, _)| *p == place && n == name).map(|(_, _, ms)| ms).sum()
    }
}

fn ratio(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    a.zip(b.filter(|b| *b > 0.0)).map(|(a, b)| a / b)
}

/// The median; of an even number the mean of the middle two.
fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = *values.get(values.len().checked_sub(1)? / 2)?;
    Some(lower.midpoint(upper))
}

/// A figure of one move.
type Figure = fn(&Moved) -> Option<f64>;
/// Its name in JSON, its title, and the digits behind the point.
const FIGURES: [(&str, &str, usize, Figure); 9] = [
    ("blackout_ms", "blackout, ms", 0, Moved::blackout),
    ("clock_gap_ms", "clock gap, ms", 0, |m| m.gap),
    ("udp_silence_ms", "UDP silence, ms", 0, |m| m.silence),
    ("before_ms", "before, ms", 0, |m| m.around.map(|[before, _]| before)),
    ("after_ms", "after, ms", 0, |m| m.around.map(|[_, after]| after)),
    ("steps_of_silence", "report/silence", 3, Moved::accounted),
    ("blackout_of_silence", "blackout/silence", 3, Moved::blackout_of_silence),
    ("total_s", "total, s", 1, |m| m.total),
    ("sent_mib", "MiB", 1, |m| m.sent),
];
const SILENCE: Figure = |m| m.silence;

/// A promise, and the figures that it is about: the medians, or one of each move.
#[derive(Debug, PartialEq)]
pub struct Judged {
    what: String,
    figures: Vec<f64>,
    within: [f64; 2],
}

impl Judged {
    /// Something was measured, and all of it is within.
    pub fn holds(&self) -> bool {
        let [least, most] = self.within;
        !self.figures.is_empty() && self.figures.iter().all(|figure| (least..=most).contains(figure))
    }
}

impl std::fmt::Display for Judged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let figures: Vec<String> = self.figures.iter().map(|figure| format!("{figure:.3}")).collect();
        let word = if self.holds() { "pass" } else { "FAIL" };
        write!(f, "{word}  {}: {}", self.what, figures.join(" "))
    }
}

/// All moves of a run.
#[derive(Debug)]
pub struct Figures {
    moves: Vec<Moved>,
}

fn cell(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |v| format!("{v:.digits$}"))
}

fn tool(stock: bool) -> &'static str {
    if stock { "xl migrate" } else { "ferry migrate" }
}

fn place(place: Place) -> &'static str {
    match place {
        Place::Source => "source",
        Place::Network => "network",
        Place::Destination => "destination",
    }
}

impl Figures {
    /// Takes the moves that were made from the lab's report; one that failed is no measurement.
    pub fn read(report: &Value) -> Result<Figures> {
        let moves = report["moves"].as_array().context("the lab's report has no moves")?;
        let made = moves.iter().filter(|entry| entry["moved"] == true);
        Ok(Figures { moves: made.map(Moved::read).collect::<Result<_>>()? })
    }

    /// So many moves were made.
    pub fn count(&self) -> usize {
        self.moves.len()
    }

    fn of<'a>(&'a self, guest: &'a str, stock: bool) -> impl Iterator<Item = &'a Moved> {
        self.moves.iter().filter(move |m| m.guest == guest && m.stock == stock)
    }

    fn median(&self, guest: &str, stock: bool, figure: Figure) -> Option<f64> {
        median(self.of(guest, stock).filter_map(figure))
    }

    /// The peer's silence by ferry, as a part of that by stock xl.
    fn of_stock(&self, guest: &str) -> Option<f64> {
        ratio(self.median(guest, false, SILENCE), self.median(guest, true, SILENCE))
    }

    /// A figure of the large guest, as a multiple of the small one's, by ferry.
    fn large_of_small(&self, figure: Figure) -> Option<f64> {
        let [small, large] = SIZES.each_ref().map(|size| self.median(size.name, false, figure));
        ratio(large, small)
    }

    /// What is promised of these figures, with what was measured.
    pub fn judged(&self) -> Vec<Judged> {
        let of_stock = SIZES.iter().map(|size| Judged {
            what: format!("{}: silence at most a third of stock xl's", size.title),
            figures: self.of_stock(size.name).into_iter().collect(),
            within: [0.0, 1.0 / 3.0],
        });
        let [small, large] = SIZES.each_ref().map(|size| size.title);
        let alike = Judged {
            what: format!("silence of {large} within 20 % of that of {small}"),
            figures: self.large_of_small(SILENCE).into_iter().collect(),
            within: [0.8, 1.2],
        };
        let accounted = SIZES.iter().map(|size| Judged {
            what: format!("{}: the report within 10 % of what the peer saw", size.title),
            figures: self.of(size.name, false).filter_map(Moved::accounted).collect(),
            within: [0.9, 1.1],
        });
        of_stock.chain([alike]).chain(accounted).collect()
    }

    /// Every step that a move of Ferry's had, in the order of the blackout.
    fn steps(&self) -> Vec<(Place, &str)> {
        let mut names: Vec<(Place, &str)> = Vec::new();
        for (place, name, _) in self.moves.iter().flat_map(|m| &m.steps) {
            if !names.contains(&(*place, name)) {
                names.push((*place, name));
            }
        }
        names
    }

    /// The median of a step over a guest's moves, ms.
    fn step(&self, guest: &str, place: Place, name: &str) -> Option<f64> {
        median(self.of(guest, false).map(|m| m.step(place, name)))
    }

    /// For a person.
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a string can't fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let mut line = |name: &str, what: &str, cells: &mut dyn Iterator<Item = String>| {
            let cells: String = cells.map(|cell| format!("{cell:>17}")).collect();
            writeln!(out, "{}", format!("{name:<9}{what:<30}{cells}").trim_end())
        };
        line("guest", "move", &mut FIGURES.iter().map(|(_, title, ..)| (*title).to_owned()))?;
        for size in &SIZES {
            for stock in [false, true] {
                let moves: Vec<&Moved> = self.of(size.name, stock).collect();
                for m in &moves {
                    let what = format!("{} {}", tool(stock), m.way);
                    line(size.title, &what, &mut FIGURES.iter().map(|(_, _, digits, of)| cell(of(m), *digits)))?;
                }
                let what = format!("{}, median of {}", tool(stock), moves.len());
                let medians =
                    FIGURES.iter().map(|(_, _, digits, of)| cell(self.median(size.name, stock, *of), *digits));
                line(size.title, &what, &mut { medians })?;
            }
        }
        line("", "", &mut std::iter::empty())?;
        for size in &SIZES {
            line(size.title, "UDP silence, ferry/xl", &mut std::iter::once(cell(self.of_stock(size.name), 3)))?;
        }
        for (what, figure) in [("UDP silence", SILENCE), ("blackout", Moved::blackout)] {
            let [small, large] = SIZES.each_ref().map(|size| size.title);
            let what = format!("{what}, {large}/{small}");
            line("", &what, &mut std::iter::once(cell(self.large_of_small(figure), 3)))?;
        }

        line("", "", &mut std::iter::empty())?;
        line("", "steps of the blackout, median ms", &mut SIZES.iter().map(|size| size.title.to_owned()))?;
        for (at, name) in self.steps() {
            // Wider than the others' names.
            let cells: String =
                SIZES.iter().map(|size| format!("{:>17}", cell(self.step(size.name, at, name), 1))).collect();
            writeln!(out, "{:<12}{name:<48}{cells}", place(at))?;
        }
        Ok(())
    }

    /// For a script.
    pub fn json(&self) -> Value {
        let figures = |of: &dyn Fn(Figure) -> Option<f64>| -> Value {
            FIGURES.iter().map(|(key, .., figure)| ((*key).to_owned(), json!(of(*figure)))).collect()
        };
        let moves = self.moves.iter().map(|m| {
            let mut entry = figures(&|figure| figure(m));
            entry["guest"] = json!(m.guest);
            entry["tool"] = json!(tool(m.stock));
            entry["way"] = json!(m.way);
            entry
        });
        let guests = SIZES.iter().map(|size| {
            let steps = self
                .steps()
                .into_iter()
                .map(|(at, name)| json!({"place": place(at), "name": name, "ms": self.step(size.name, at, name)}));
            let guest = json!({
                "ferry": figures(&|figure| self.median(size.name, false, figure)),
                "xl": figures(&|figure| self.median(size.name, true, figure)),
                "udp_silence_ferry_of_xl": self.of_stock(size.name),
                "steps": steps.collect::<Vec<_>>(),
            });
            (size.name.to_owned(), guest)
        });
        json!({
            "moves": moves.collect::<Vec<_>>(),
            "medians": guests.collect::<Value>(),
            "udp_silence_large_of_small": self.large_of_small(SILENCE),
            "blackout_large_of_small": self.large_of_small(Moved::blackout),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn a_move(guest: &str, how: &str, silence: f64, steps: &[(&str, &str, u64)]) -> Value {
        let steps: Vec<Value> =
            steps.iter().map(|(place, name, micros)| json!({"place": place, "name": name, "micros": micros})).collect();
        let total: u64 = steps.iter().filter_map(|s| s["micros"].as_u64()).sum();
        let report = json!({
            "id": "00000000-0000-0000-0000-000000000001", "domid": 1, "name": guest, "peer": "10.77.0.102",
            "moved": true, "error": null, "ending": "moved", "rounds": [], "bytes": 5, "total_ms": 9,
            "blackout_us": total, "steps": steps, "silence": {"before_us": 20_000, "after_us": 30_000},
        });
        json!({
            "guest": guest, "how": how, "from": "a", "to": "b", "moved": true, "bytes": 3 << 20, "total": 12.5,
            "udp_silence": silence, "clock_gap": 0.5, "report": if steps.is_empty() { Value::Null } else { report },
        })
    }

    fn run() -> Value {
        let ferry = |guest, silence, pause, connect| {
            a_move(guest, "ferry migrate", silence, &[("source", "pause", pause), ("destination", "connect", connect)])
        };
        let mut failed = ferry("small", 9.0, 1, 1);
        failed["moved"] = json!(false);
        json!({"moves": [
            ferry("small", 1.0, 100_000, 800_000), failed, ferry("small", 3.0, 300_000, 2_600_000),
            ferry("small", 1.1, 200_000, 900_000), a_move("small", "xl migrate", 4.4, &[]),
            ferry("large", 1.2, 200_000, 1_000_000), ferry("large", 1.4, 200_000, 1_100_000),
            a_move("large", "xl migrate", 5.0, &[]), a_move("large", "xl migrate", 6.0, &[]),
        ]})
    }

    /// The cells of the first line that begins with these words, without them.
    fn row(text: &str, start: &str) -> Vec<String> {
        let line = text.lines().map(str::trim).find_map(|l| l.strip_prefix(start));
        line.unwrap_or_else(|| panic!("{start}: {text}")).split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn medians_and_ratios_stand_in_the_table() {
        let figures = Figures::read(&run()).expect("figures");
        assert_eq!(figures.count(), 8, "one of nine failed");
        let text = figures.text();
        assert_eq!(
            row(&text, "256 MiB  ferry migrate a to b"),
            ["900", "500", "1000", "20", "30", "0.950", "0.900", "12.5", "3.0"]
        );
        // The medians of the moves' own ratios (0.9, 0.967, 1.0 and 0.95, 0.983, 1.045), not the ratios of the medians.
        let medians = row(&text, "256 MiB  ferry migrate, median of 3");
        assert_eq!(medians, ["1100", "500", "1100", "20", "30", "0.983", "0.967", "12.5", "3.0"]);
        let stock = row(&text, "1 GiB    xl migrate, median of 2");
        assert_eq!(stock, ["-", "500", "5500", "-", "-", "-", "-", "12.5", "3.0"]);
        assert_eq!(row(&text, "256 MiB  UDP silence, ferry/xl"), ["0.250"]);
        assert_eq!(row(&text, "1 GiB    UDP silence, ferry/xl"), ["0.236"]);
        assert_eq!(row(&text, "UDP silence, 1 GiB/256 MiB"), ["1.182"]);
        assert_eq!(row(&text, "blackout, 1 GiB/256 MiB"), ["1.136"]);
        assert_eq!(row(&text, "source      pause"), ["200.0", "200.0"]);
        assert_eq!(row(&text, "destination connect"), ["900.0", "1050.0"]);
    }

    #[test]
    fn what_is_promised_is_held_against_every_figure() {
        let judged = Figures::read(&run()).expect("figures").judged();
        let holds: Vec<bool> = judged.iter().map(Judged::holds).collect();
        // The small guest's third move reports 1.045 of what its peer saw, and no move 0.95.
        assert_eq!(holds, [true, true, true, true, true], "{judged:?}");
        assert_eq!(judged[0].to_string(), "pass  256 MiB: silence at most a third of stock xl's: 0.250");
        let mut report = run();
        report["moves"][3]["udp_silence"] = json!(1.3);
        report["moves"][4]["udp_silence"] = json!(3.0);
        let judged = Figures::read(&report).expect("figures").judged();
        let wrong: Vec<String> = judged.iter().filter(|j| !j.holds()).map(ToString::to_string).collect();
        assert_eq!(
            wrong,
            [
                "FAIL  256 MiB: silence at most a third of stock xl's: 0.433",
                "FAIL  256 MiB: the report within 10 % of what the peer saw: 0.950 0.983 0.885"
            ]
        );
        let nothing = Figures::read(&json!({"moves": []})).expect("figures").judged();
        assert!(nothing.iter().all(|j| !j.holds()), "what was not measured does not hold");
    }

    #[test]
    fn json_has_the_same() {
        let value = Figures::read(&run()).expect("figures").json();
        assert_eq!(value["moves"].as_array().map(Vec::len), Some(8));
        assert_eq!(value["moves"][2]["udp_silence_ms"], 1100.0);
        assert_eq!(value["medians"]["small"]["ferry"]["blackout_ms"], 1100.0);
        assert_eq!(value["medians"]["small"]["xl"]["blackout_ms"], Value::Null);
        assert_eq!(value["medians"]["large"]["xl"]["udp_silence_ms"], 5500.0);
        assert_eq!(
            value["medians"]["large"]["steps"][1],
            json!({"place": "destination", "name": "connect", "ms": 1050.0})
        );
        assert_eq!(value["medians"]["small"]["udp_silence_ferry_of_xl"], 0.25);
    }

    #[test]
    fn what_was_not_measured_is_no_figure() {
        let mut report = run();
        report["moves"][0]["udp_silence"] = Value::Null;
        let text = Figures::read(&report).expect("figures").text();
        assert_eq!(row(&text, "256 MiB  ferry migrate a to b")[2..7], ["-", "20", "30", "-", "-"]);
        let nothing = Figures::read(&json!({"moves": []})).expect("figures");
        assert_eq!(row(&nothing.text(), "256 MiB  UDP silence, ferry/xl"), ["-"]);
        assert!(Figures::read(&json!({})).is_err());
        report["moves"][0]["report"] = json!({"steps": 3});
        assert!(Figures::read(&report).is_err());
    }
}
