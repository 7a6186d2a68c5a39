package driver

import (
	"encoding/base64"
	"fmt"
	"strings"
)

// page is one part of a listing that is sorted by a key. The token is the last key that was returned, so
// that what comes and goes between two calls shifts nothing.
type page struct {
	kind  string // of the listing
	after string // keys up to this one have been returned
	max   int    // entries; 0: no limit

	entries int
	last    string // key of the last one
	next    string // token of the next page; "" if this is the last
}

// newPage reads max_entries and starting_token; kind keeps the tokens of different listings apart. A token that
// this listing did not make is errToken, which tells the caller to start again.
func newPage(kind string, maxEntries int32, token string) (*page, error) {
	if maxEntries < 0 {
		return nil, invalid("max_entries is %d", maxEntries)
	}
	p := &page{kind: kind, max: int(maxEntries)}
	if token == "" {
		return p, nil
	}
	raw, err := base64.RawURLEncoding.DecodeString(token)
	after, ok := strings.CutPrefix(string(raw), kind+":")
	if err != nil || !ok {
		return nil, fmt.Errorf("%w: %q", errToken, token)
	}
	p.after = after
	return p, nil
}

// token returns the token of the page after the one that ends with key.
func token(kind, key string) string {
	return base64.RawURLEncoding.EncodeToString([]byte(kind + ":" + key))
}

// takes tells whether the page has room for one more entry, that of key. If not, next is set, and the listing ends.
func (p *page) takes(key string) bool {
	if p.max > 0 && p.entries == p.max {
		p.next = token(p.kind, p.last)
		return false
	}
	p.entries, p.last = p.entries+1, key
	return true
}
