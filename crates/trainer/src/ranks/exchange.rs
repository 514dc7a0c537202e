//! Who sends which rows to whom, when every rank asks for some by their index among all.

/// One rank's part of an exchange. Ranks hold `rows` rows each; a row that is asked for twice by one rank is sent once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Exchange {
    /// Own rows to send, in the order of the ranks that want them.
    pub send: Vec<i64>,
    /// How many of them go to each rank.
    pub send_counts: Vec<i64>,
    /// How many come from each rank.
    pub receive_counts: Vec<i64>,
    /// For each index that this rank asked for its place among what came, in the order of the ranks it came from.
    pub places: Vec<i64>,
}

impl Exchange {
    /// From what each rank asks for; `rank` holds the rows `rank * rows ..`. Own rows are exchanged like the others, with oneself.
    ///
    /// # Panics
    /// When an index is beyond all rows.
    pub(super) fn plan(wanted: &[Vec<u64>], rank: usize, rows: u64) -> Exchange {
        let world = wanted.len();
        // What `by` asks of `of`: each row once, in ascending order.
        let asked = |by: usize, of: usize| {
            let owned = of as u64 * rows..(of as u64 + 1) * rows;
            let mut asked: Vec<u64> = wanted[by].iter().copied().filter(|index| owned.contains(index)).collect();
            asked.sort_unstable();
            asked.dedup();
            asked
        };
        let to_send: Vec<Vec<u64>> = (0..world).map(|by| asked(by, rank)).collect();
        let to_receive: Vec<Vec<u64>> = (0..world).map(|of| asked(rank, of)).collect();
        let receive_counts = to_receive.iter().map(|rows| rows.len() as i64).collect();
        let to_receive = to_receive.concat();
        // Ascending within a rank, and ranks ascend: all of it ascends.
        let place = |index: &u64| to_receive.binary_search(index).expect("an index below all rows") as i64;
        Exchange {
            send_counts: to_send.iter().map(|rows| rows.len() as i64).collect(),
            send: to_send.into_iter().flatten().map(|index| (index - rank as u64 * rows) as i64).collect(),
            receive_counts,
            places: wanted[rank].iter().map(place).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn everybody_gets_what_it_asked_for(
            (world, rows, seed) in (1usize..6, 1u64..7, any::<u64>()),
        ) {
            let all = world as u64 * rows;
            let index = |rank: usize, at: u64| (seed ^ (rank as u64 * 31 + at).wrapping_mul(0x9E37_79B9_7F4A_7C15)).rotate_left(17) % all;
            let wanted: Vec<Vec<u64>> = (0..world).map(|r| (0..rows).map(|at| index(r, at)).collect()).collect();
            let plans: Vec<Exchange> = (0..world).map(|rank| Exchange::plan(&wanted, rank, rows)).collect();
            for (rank, plan) in plans.iter().enumerate() {
                // As an all-to-all delivers it.
                let mut came = Vec::new();
                for (from, sender) in plans.iter().enumerate() {
                    let first: i64 = sender.send_counts[..rank].iter().sum();
                    let count = sender.send_counts[rank];
                    prop_assert_eq!(plan.receive_counts[from], count);
                    came.extend(sender.send[first as usize..][..count as usize].iter().map(|&r| from as u64 * rows + r as u64));
                }
                let got: Vec<u64> = plan.places.iter().map(|&place| came[place as usize]).collect();
                prop_assert_eq!(&got, &wanted[rank]);
                prop_assert_eq!(plan.send_counts.iter().sum::<i64>() as usize, plan.send.len());
            }
        }
    }
}
