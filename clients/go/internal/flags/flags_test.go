package flags

import (
	"flag"
	"testing"

	hidreamv1 "github.com/hidream-grpc/hidream-grpc/clients/go/hidream/v1"
)

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
