package flags

import (
	"flag"
	"testing"

	hidreamv1 "github.com/hidream-grpc/hidream-grpc/clients/go/hidream/v1"
)

func TestAnEmptyTokenIsRefused(t *testing.T) {
	for _, token := range []string{"", " "} {
		t.Setenv("HIDREAM_TOKEN", token)
		set := flag.NewFlagSet("jobs", flag.ContinueOnError)
		connection, err := ServerOf(set).Connect()
		want := "HIDREAM_TOKEN: is empty; leave it out to call without a token"
		if connection != nil || err == nil || err.Error() != want {
			t.Errorf("%q: %v", token, err)
		}
	}
}

func TestAModelIsInTheRequestOnlyWhenItIsNamed(t *testing.T) {
	for _, arguments := range [][]string{nil, {"-model", "dev"}} {
		request := &hidreamv1.SubmitJobRequest{}
		set := flag.NewFlagSet("submit", flag.ContinueOnError)
		Model(set, &request.Model)
		if err := set.Parse(arguments); err != nil {
			t.Fatal(err)
		}
		if isNamed := request.Model != nil; isNamed != (arguments != nil) {
			t.Errorf("%v: named %t", arguments, isNamed)
		}
		if want := map[bool]string{true: "dev"}[arguments != nil]; request.GetModel() != want {
			t.Errorf("%v: model %q", arguments, request.GetModel())
		}
	}
}
