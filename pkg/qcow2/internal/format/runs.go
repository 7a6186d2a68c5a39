package format

// Run is a range of host clusters.
type Run struct{ First, N int64 }

// End returns the cluster behind the last.
func (r Run) End() int64 { return r.First + r.N }

// Has tells whether cluster c is one of them.
func (r Run) Has(c int64) bool { return c >= r.First && c < r.End() }

// Runs gathers host clusters into maximal runs of neighbours, in the order in which they come.
type Runs []Run

// Add appends r, or makes the last run longer where r follows it.
func (rs *Runs) Add(r Run) {
	if r.N == 0 {
		return
	}
	if k := len(*rs); k > 0 && (*rs)[k-1].End() == r.First {
		(*rs)[k-1].N += r.N
		return
	}
	*rs = append(*rs, r)
}

// Clusters returns how many there are in all.
func (rs Runs) Clusters() int64 {
	var n int64
	for _, r := range rs {
		n += r.N
	}
	return n
}
