//! A load report as a short table.

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

/// The first component of a tensor's name.
pub(crate) fn top_part(name: &str) -> &str {
    name.split(['.', '/']).next().unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

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
