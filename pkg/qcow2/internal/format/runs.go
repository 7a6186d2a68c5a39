package format

// Run is N neighbouring host clusters.
type Run struct {
	First Cluster
	N     int64
}

// RunTo returns the run from first up to end, which is not in it.
func RunTo(first, end Cluster) Run { return Run{first, int64(end - first)} }

// End returns the cluster behind the last.
func (r Run) End() Cluster { return r.First + Cluster(r.N) }

// Behind returns what is left of r behind the first n clusters.
func (r Run) Behind(n int64) Run { return Run{r.First + Cluster(n), r.N - n} }

// Has tells whether c is one of them.
func (r Run) Has(c Cluster) bool { return c >= r.First && c < r.End() }

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
