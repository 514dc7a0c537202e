//! The order law over random shards, lanes, windows and batches.

use std::collections::HashMap;

use blip2_data::{Located, Order};
use proptest::prelude::*;

#[derive(Debug, Clone)]
struct Law {
    counts: Vec<u64>,
    seed: u64,
    lanes: usize,
    global_batch: usize,
    window_shards: usize,
}

impl Law {
    fn order(&self) -> Order {
        Order::new(&self.counts, self.seed, self.lanes, self.global_batch, self.window_shards).unwrap()
    }

    fn samples(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Positions that hold the first `epochs` epochs of every lane, and a little more.
    fn positions(&self, epochs: u64) -> u64 {
        let batches = (epochs * self.samples()).div_ceil(self.global_batch as u64) + 2;
        batches * self.global_batch as u64
    }

    fn shard_of(&self, index: u64) -> usize {
        let mut end = 0;
        self.counts
            .iter()
            .position(|count| {
                end += count;
                index < end
            })
            .unwrap()
    }
}

prop_compose! {
    fn law()(
        counts in prop::collection::vec(0u64..40, 1..12).prop_filter("no sample", |c| c.iter().sum::<u64>() > 0),
        seed: u64,
        lanes in 1usize..7,
        slots in 1usize..6,
        window_shards in 1usize..5,
    ) -> Law {
        Law { counts, seed, lanes, global_batch: lanes * slots, window_shards }
    }
}

proptest! {
    #[test]
    fn every_sample_comes_once_per_epoch(law in law()) {
        let order = law.order();
        let mut epochs: HashMap<u64, Vec<u64>> = HashMap::new();
        for position in 0..law.positions(3) {
            let located = order.locate(position);
            epochs.entry(located.epoch).or_default().push(located.index);
        }
        for epoch in 0..3 {
            let mut indices = epochs.remove(&epoch).unwrap_or_default();
            indices.sort_unstable();
            prop_assert_eq!(indices, (0..law.samples()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_lane_draws_its_epochs_one_after_another_and_within_one_sample_of_the_others(law in law()) {
        let order = law.order();
        let mut drawn: HashMap<(u32, u64), u64> = HashMap::new();
        let mut at = vec![0; law.lanes];
        for position in 0..law.positions(4) {
            let Located { epoch, lane, .. } = order.locate(position);
            prop_assert!(epoch >= at[lane as usize]);
            at[lane as usize] = epoch;
            *drawn.entry((lane, epoch)).or_default() += 1;
        }
        for epoch in 0..4 {
            let lengths: Vec<u64> = (0..law.lanes as u32).map(|l| drawn.get(&(l, epoch)).copied().unwrap_or(0)).collect();
            prop_assert!(lengths.iter().max().unwrap() - lengths.iter().min().unwrap() <= 1, "{:?}", lengths);
        }
    }

    #[test]
    fn lanes_share_a_shard_only_at_their_seams(law in law()) {
        let order = law.order();
        let mut lanes_of: HashMap<(u64, usize), Vec<u32>> = HashMap::new();
        for position in 0..law.positions(1) {
            let located = order.locate(position);
            let lanes = lanes_of.entry((located.epoch, law.shard_of(located.index))).or_default();
            if !lanes.contains(&located.lane) {
                lanes.push(located.lane);
            }
        }
        // Contiguous ranges: the lanes of a shard are neighbours, and L ranges have at most L - 1 seams.
        let shared: usize = lanes_of.iter().filter(|((epoch, _), _)| *epoch == 0).map(|(_, lanes)| lanes.len() - 1).sum();
        prop_assert!(shared < law.lanes);
    }

    #[test]
    fn seeking_equals_having_run_there(law in law(), skip in 0u64..500) {
        let ran = law.order();
        let all: Vec<Located> = (0..skip + 20).map(|p| ran.locate(p)).collect();
        let sought = law.order();
        for back in (skip..skip + 20).rev() {
            prop_assert_eq!(sought.locate(back), all[back as usize]);
        }
    }

    #[test]
    fn a_window_is_read_whole_before_the_next_begins(law in law()) {
        let order = law.order();
        let lane_batch = law.global_batch / law.lanes;
        for lane in 0..law.lanes {
            let positions: Vec<u64> = (0..law.positions(2))
                .filter(|p| (*p as usize % law.global_batch) / lane_batch == lane)
                .collect();
            let mut at = 0;
            while at < positions.len() {
                let mut window: Vec<u64> = order.window(positions[at]).collect();
                window.push(order.locate(positions[at]).index);
                let end = at + window.len();
                if end > positions.len() {
                    break;
                }
                let mut ran: Vec<u64> = positions[at..end].iter().map(|&p| order.locate(p).index).collect();
                ran.sort_unstable();
                window.sort_unstable();
                prop_assert_eq!(&ran, &window);
                let mut shards: Vec<usize> = window.iter().map(|&i| law.shard_of(i)).collect();
                shards.dedup();
                prop_assert!(shards.len() <= law.window_shards);
                at = end;
            }
        }
    }

    #[test]
    fn the_shards_ahead_are_those_that_the_next_batches_and_windows_draw_from(
        law in law(), batch in 0u64..60, batches in 1usize..5, ranks in prop::sample::select(vec![1u64, 2, 3]),
    ) {
        let order = law.order();
        let (global, lane_batch) = (law.global_batch as u64, (law.global_batch / law.lanes) as u64);
        let slice = global.div_ceil(ranks);
        for rank in 0..ranks {
            let slots = (rank * slice).min(global - 1)..((rank + 1) * slice).min(global);
            let ahead = order.shards_ahead(batch * global, batches, &slots);
            let mut needed = Vec::new();
            for position in (batch * global..(batch + batches as u64) * global).filter(|p| slots.contains(&(p % global))) {
                needed.push(law.shard_of(order.locate(position).index));
            }
            prop_assert!(needed.iter().all(|shard| ahead.contains(shard)), "{:?} of {:?}", needed, ahead);
            // Nothing but what the lanes draw until one window further on.
            let mut allowed = Vec::new();
            for lane in order.lanes_of(&slots) {
                let lane_positions = |b: u64| (0..lane_batch).map(move |i| b * global + lane * lane_batch + i);
                let mut positions = (batch..).flat_map(lane_positions);
                let end = (batch + batches as u64) * global;
                for position in positions.by_ref().take_while(|&position| position < end) {
                    allowed.extend(std::iter::once(order.locate(position).index).chain(order.window(position)));
                }
                // The rest of the last window, and the one behind it.
                let rest = 2 * law.samples();
                allowed.extend(positions.take(rest as usize).map(|position| order.locate(position).index));
            }
            let allowed: Vec<usize> = allowed.into_iter().map(|index| law.shard_of(index)).collect();
            prop_assert!(ahead.iter().all(|shard| allowed.contains(shard)));
            let mut once = ahead.clone();
            once.sort_unstable();
            once.dedup();
            prop_assert_eq!(once.len(), ahead.len());
            prop_assert!(ahead.len() <= law.counts.len());
        }
    }

    #[test]
    fn a_replacement_is_what_the_law_puts_next(law in law(), position in 0u64..200) {
        let order = law.order();
        if law.lanes == 1 {
            let next = order.locate(position + 1);
            let replacement = order.window(position).next();
            let window: Vec<u64> = order.window(position).collect();
            if next.epoch == order.locate(position).epoch && window.contains(&next.index) {
                prop_assert_eq!(replacement, Some(next.index));
            }
        }
    }
}

#[test]
fn a_seed_and_an_epoch_change_the_order() {
    let order = |seed| Order::new(&[50; 4], seed, 1, 10, 2).unwrap();
    let run = |order: &Order, from: u64| (from..from + 200).map(|p| order.locate(p).index).collect::<Vec<_>>();
    assert_ne!(run(&order(1), 0), run(&order(2), 0));
    assert_ne!(run(&order(1), 0), run(&order(1), 200));
}

/// Eight hosts with a lane each: what two of them fetch in an epoch lies where their lanes meet.
#[test]
fn hosts_with_lanes_of_their_own_fetch_each_shard_but_those_at_the_seams_once() {
    let (hosts, counts) = (8u64, [100u64; 403]);
    let order = Order::new(&counts, 11, hosts as usize, 64, 4).unwrap();
    let batches = counts.iter().sum::<u64>().div_ceil(64);
    for epoch in [0, 3] {
        let mut fetched: HashMap<usize, Vec<u64>> = HashMap::new();
        for position in epoch * batches * 64..(epoch + 1) * batches * 64 {
            let located = order.locate(position);
            let by = fetched.entry(located.index as usize / 100).or_default();
            if located.epoch == epoch && !by.contains(&(position % 64 / 8)) {
                by.push(position % 64 / 8);
            }
        }
        let twice = fetched.values().filter(|hosts| hosts.len() > 1).count();
        println!("epoch {epoch}: {twice} of {} shards are fetched by more than one of {hosts} hosts", counts.len());
        assert!(twice < hosts as usize, "{twice}");
        assert!(twice > 0, "403 shards cannot be cut into eight without a seam");
    }
}
