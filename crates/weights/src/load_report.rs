//! A load report as a short table, and what it passed over.

use std::collections::BTreeMap;
use std::fmt;

use blip2_torchx::params::LoadReport;

/// What a load did, counted by part of the model.
pub struct LoadTable<'a>(pub &'a LoadReport);

impl fmt::Display for LoadTable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = [&self.0.loaded, &self.0.cast, &self.0.fresh, &self.0.unused];
        let mut rows: BTreeMap<&str, [usize; 4]> = BTreeMap::new();
        for (column, names) in columns.iter().enumerate() {
            for name in names.iter() {
                rows.entry(top_part(name)).or_default()[column] += 1;
            }
        }
        let width = rows.keys().map(|part| part.len()).chain([4]).max().unwrap_or(4);
        write!(f, "{:width$}  {:>6}  {:>6}  {:>6}  {:>6}", "part", "loaded", "cast", "fresh", "unused")?;
        for (part, [loaded, cast, fresh, unused]) in rows {
            write!(f, "\n{part:width$}  {loaded:>6}  {cast:>6}  {fresh:>6}  {unused:>6}")?;
        }
        Ok(())
    }
}

/// What a load passed over, counted by the first component of the names below `vision_model.`: `head (11), text_model (196)`; `None`
/// where it is nothing.
pub fn unused_modules(report: &LoadReport) -> Option<String> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for name in &report.unused {
        *counts.entry(top_part(name.strip_prefix("vision_model.").unwrap_or(name))).or_default() += 1;
    }
    let listed: Vec<String> = counts.iter().map(|(module, count)| format!("{module} ({count})")).collect();
    (!listed.is_empty()).then(|| listed.join(", "))
}

/// The first component of a tensor's name.
pub(crate) fn top_part(name: &str) -> &str {
    name.split(['.', '/']).next().unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_passed_over_is_counted_by_module() {
        let unused = ["vision_model.head.probe", "vision_model.head.mlp.fc1.bias", "text_model.a.b", "logit_scale"];
        let report = LoadReport { unused: unused.map(String::from).to_vec(), ..LoadReport::default() };
        assert_eq!(unused_modules(&report).unwrap(), "head (2), logit_scale (1), text_model (1)");
        assert_eq!(unused_modules(&LoadReport::default()), None);
    }

    #[test]
    fn counts_by_part() {
        let names = |names: &[&str]| names.iter().map(|n| n.to_string()).collect();
        let report = LoadReport {
            loaded: names(&["qformer.a", "qformer.b", "temp"]),
            cast: names(&["qformer.b"]),
            fresh: names(&["query_tokens"]),
            unused: names(&["pooler.dense.weight"]),
        };
        let table = LoadTable(&report).to_string();
        let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["part", "loaded", "cast", "fresh", "unused"]);
        assert!(lines.contains(&vec!["qformer", "2", "1", "0", "0"]));
        assert!(lines.contains(&vec!["query_tokens", "0", "0", "1", "0"]));
        assert!(lines.contains(&vec!["pooler", "0", "0", "0", "1"]));
    }
}
